"""The chunked gated delta rule against the recurrence and transformers."""

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from topmass.integrations.transformers import gated_delta
from topmass.integrations.transformers.gated_delta import chunk_gated_delta_rule

reference = modeling_qwen3_5.torch_chunk_gated_delta_rule


def inputs(length, k_heads, v_heads, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    q, k = torch.randn(2, length, k_heads, 32), torch.randn(2, length, k_heads, 32)
    v, g, beta = torch.randn(2, length, v_heads, 16), -torch.rand(2, length, v_heads), torch.rand(2, length, v_heads)
    return tuple(x.to(dtype) for x in (q, k, v, g, beta))


def recurrence(q, k, v, g, beta, state=None):
    """The rule, one token at a time."""
    repeat = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]) if state is None else state
    out = []
    for t in range(k.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1), state


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 129, 400])
@pytest.mark.parametrize(("k_heads", "v_heads"), [(1, 1), (2, 4)])
@pytest.mark.parametrize("started", [False, True])
def test_equals_the_recurrence_in_float64(length, k_heads, v_heads, started):
    x = inputs(length, k_heads, v_heads, dtype=torch.float64)
    state = torch.randn(2, v_heads, 32, 16, dtype=torch.float64) if started else None
    out, last = chunk_gated_delta_rule(*x, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    want, want_last = recurrence(*x, state)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, want_last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 63, 130, 700])
def test_stands_in_for_transformers(length):
    x = inputs(length, 2, 4)
    state = torch.randn(2, 4, 32, 16)
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True, "cu_seqlens": None}
    out, last = chunk_gated_delta_rule(*x, **options)
    want, want_last = reference(*x, **options)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, want_last, rtol=1e-5, atol=1e-5)


def test_splitting_a_prompt_changes_nothing():
    x = inputs(300, 2, 2, dtype=torch.float64)
    whole, last = chunk_gated_delta_rule(*x, output_final_state=True)
    head, state = chunk_gated_delta_rule(*(t[:, :101] for t in x), output_final_state=True)
    tail, end = chunk_gated_delta_rule(*(t[:, 101:] for t in x), initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-9)


def test_repeated_keys_keep_their_precision():
    q, k, v, g, beta = inputs(256, 2, 2)
    x = (q, k[:, :1].expand_as(k), v, torch.full_like(g, -0.01), torch.full_like(beta, 0.99))
    got, _ = chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)
    want, _ = chunk_gated_delta_rule(*(t.double() for t in x), use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_gradients():
    x = [
        t[:1, :21, :, :4].requires_grad_() if t.ndim == 4 else t[:1, :21].requires_grad_()
        for t in inputs(21, 1, 2, dtype=torch.float64)
    ]
    rule = lambda *t: chunk_gated_delta_rule(*t, chunk_size=8, use_qk_l2norm_in_kernel=True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(rule, x)


def test_low_precision_in_and_out():
    x = inputs(70, 2, 2, dtype=torch.bfloat16)
    out, last = chunk_gated_delta_rule(*x)
    assert (out.dtype, last) == (torch.bfloat16, None)


def test_long_inputs_piece_by_piece(monkeypatch) -> None:
    gen = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1300, 2, 8, generator=gen, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 1300, 4, 8, generator=gen, dtype=torch.float64)
    g = -torch.rand(1, 1300, 4, generator=gen, dtype=torch.float64)
    beta = torch.rand(1, 1300, 4, generator=gen, dtype=torch.float64)
    settings = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    whole, last = gated_delta.chunk_gated_delta_rule(q, k, v, g, beta, **settings)
    monkeypatch.setattr(gated_delta, "_segment", lambda value, chunk_size: 512)

    with torch.no_grad():
        out, state = gated_delta.chunk_gated_delta_rule(q, k, v, g, beta, **settings)

    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)
