"""Dense attention with its normaliser, every backend that can run here."""

import sys
import types

import oracle64
import pytest
import torch

from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import _dispatch, _logits, attention_mass, dense_lse
from topmass.ops.dense_prefill import _flash3
from topmass.testing import assert_as_accurate_as

ON_GPU = torch.cuda.is_available()


def make(*, q_len=13, kv_len=29, h=4, hk=2, d=8, dv=8, dtype=torch.float64, device="cpu"):
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, q_len, h, d), (2, kv_len, hk, d), (2, kv_len, hk, dv))
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(device, dtype) for s in shapes]


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("q_len", [1, 13, 29])
def test_reference(q_len, softcap, sinks, monkeypatch):
    q, k, v = make(q_len=q_len, dv=5)
    more = {"softcap": softcap, "sinks": torch.randn(4, dtype=torch.float64) if sinks else None}
    p = oracle64.probabilities(q, k, scale=0.3, **more)
    expected = oracle64.attend(q, k, v, p > 0, scale=0.3, **more)

    for rows in (None, 4):
        if rows:
            monkeypatch.setattr(_logits, "WORKSPACE_BYTES", 8 * 2 * 4 * 29 * rows)
        out, lse = dense_lse(q, k, v, scale=0.3, **more)

        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
        mass = attention_mass(q, k, lse, scale=0.3, q_start=29 - q_len, share="q_head", **more)
        torch.testing.assert_close(mass, p, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    out, lse = dense_lse(*make(dtype=dtype), scale=0.3)

    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("name", [b for b in _dispatch.available("dense_lse") if b != "reference"])
@pytest.mark.parametrize(("q_len", "d", "sinks"), [(97, 64, False), (33, 128, False), (1, 64, True), (97, 256, True)])
def test_fused_kernels(name, q_len, d, sinks):
    device = "cuda" if ON_GPU else "cpu"
    q, k, v = make(q_len=q_len, kv_len=97, d=d, dv=d, dtype=torch.bfloat16, device=device)
    learned = torch.randn(4, device=device) if sinks else None
    exact = dense_lse(*(x.double() for x in (q, k, v)), scale=0.1, sinks=learned, backend="reference")
    baseline = dense_lse(q, k, v, scale=0.1, sinks=learned, backend="reference")
    try:
        found = dense_lse(q, k, v, scale=0.1, sinks=learned, backend=name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))

    assert_as_accurate_as(found[0], exact=exact[0], baseline=baseline[0])
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("old", [False, True])
def test_flash3_is_asked_for_what_it_has(old, monkeypatch):
    q, k, v = make(d=8, dtype=torch.float16)
    learned = torch.randn(4)
    seen = {}

    def attend(q, k, v, softmax_scale, causal, softcap, **more):
        if old and more:
            raise TypeError("unexpected keyword argument")
        seen.update(softmax_scale=softmax_scale, causal=causal, softcap=softcap, **more)
        out, lse = dense_lse(q, k, v, scale=softmax_scale, softcap=softcap or None, backend="reference")
        return out, lse.transpose(1, 2).contiguous()

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = attend
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(_flash3, "_has_package", lambda: True)
    flash3 = _dispatch._BACKENDS["dense_lse"]["flash3"].fn

    out, lse = flash3(q, k, v, scale=0.3, softcap=2.0, sinks=learned)

    exact, norm = dense_lse(q, k, v, scale=0.3, softcap=2.0, sinks=learned, backend="reference")
    assert seen == {"softmax_scale": 0.3, "causal": True, "softcap": 2.0} | ({} if old else {"return_attn_probs": True})
    torch.testing.assert_close(lse, norm)
    torch.testing.assert_close(out, exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("extra", [(), ("o_scale",)])
def test_flash3_of_vllm_is_called_by_the_names_of_its_arguments(extra, monkeypatch):
    q, k, v = make(d=8, dtype=torch.float16)
    b, q_len, h, _ = q.shape
    names = (
        "q", "k", "v", "k_new", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "q_descale",
        *extra, "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap",
        "is_rotary_interleaved", "num_splits", "pack_gqa", "sm_margin", "s_aux", "cp_world_size", "cp_rank",
    )  # fmt: skip
    seen = {}

    class Op:
        _schema = types.SimpleNamespace(arguments=[types.SimpleNamespace(name=name) for name in names])

        def __call__(self, *given):
            seen.update(zip(names, given, strict=True))
            settings = {"scale": seen["softmax_scale"], "softcap": seen["softcap"]}
            shaped = (seen[name].unflatten(0, (b, -1)) for name in ("q", "k", "v"))
            out, lse = dense_lse(*shaped, **settings, backend="reference")
            return out.flatten(0, 1), lse.permute(2, 0, 1).reshape(h, -1).contiguous(), None

    monkeypatch.setattr(_flash3, "_has_package", lambda: False)
    monkeypatch.setattr(_flash3, "_op", Op)

    out, lse = _dispatch._BACKENDS["dense_lse"]["flash3"].fn(q, k, v, scale=0.3, softcap=2.0, sinks=None)

    exact, norm = dense_lse(q, k, v, scale=0.3, softcap=2.0, backend="reference")
    assert seen["cu_seqlens_q"].tolist() == [i * q_len for i in range(b + 1)]
    assert seen["cu_seqlens_k"].tolist() == [i * k.shape[1] for i in range(b + 1)]
    assert (seen["max_seqlen_q"], seen["max_seqlen_k"], seen["is_causal"]) == (q_len, k.shape[1], True)
    assert all(seen[name] is None for name in ("k_new", "out", "q_descale", "s_aux", "pack_gqa", *extra))
    torch.testing.assert_close((out, lse), (exact, norm))


def test_flash3_of_vllm_is_found_without_importing_vllm(tmp_path, monkeypatch):
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    find = _flash3._extension.__wrapped__

    assert find() is None
    (folder / "_vllm_fa3_C.abi3.so").touch()
    assert find() == folder / "_vllm_fa3_C.abi3.so"


@pytest.mark.skipif(ON_GPU, reason="these kernels can run here")
def test_kernels_say_why_not():
    q, k, v = make(dtype=torch.float16)
    for name, reason in [
        ("flash2", "needs CUDA tensors"),
        ("flash3", "flash_attn_interface"),
        ("cudnn", "as many queries"),
    ]:
        with pytest.raises(BackendUnavailableError, match=reason):
            dense_lse(q, k, v, scale=1.0, backend=name)
    for name in ("flash2", "cudnn"):
        with pytest.raises(BackendUnavailableError, match="no soft-cap"):
            dense_lse(q, k, v, scale=1.0, softcap=3.0, backend=name)


def test_misuse_is_named():
    q, k, v = make()
    with pytest.raises(ConfigError, match="got 13 queries and 12 keys"):
        dense_lse(q, k[:, :12], v[:, :12], scale=1.0)
    with pytest.raises(ConfigError, match="multiple of kv_heads, got 3 and 2"):
        dense_lse(q[:, :, :3], k, v, scale=1.0)
