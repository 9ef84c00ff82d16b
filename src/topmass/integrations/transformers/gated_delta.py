"""The chunked gated delta rule in vectorised PyTorch: no solver, no loop over rows, few steps over chunks.

Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464. transformers' own PyTorch version takes a step for each row of a
chunk and for each chunk; here a chunk's triangular system is inverted block by block, and the states between chunks are found in
about 2 sqrt(chunks) steps. It can be differentiated and captured in a CUDA graph.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["chunk_gated_delta_rule"]


def chunk_gated_delta_rule(
    query: Float[Tensor, "batch len k_heads k_dim"],
    key: Float[Tensor, "batch len k_heads k_dim"],
    value: Float[Tensor, "batch len v_heads v_dim"],
    g: Float[Tensor, "batch len v_heads"],
    beta: Float[Tensor, "batch len v_heads"],
    *,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "batch v_heads k_dim v_dim"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **ignored: object,
) -> tuple[Float[Tensor, "batch len v_heads v_dim"], Float[Tensor, "batch v_heads k_dim v_dim"] | None]:
    """Outputs of the recurrence S <- exp(g) S + k (beta (v - exp(g) S^T k))^T, o = S^T q / sqrt(k_dim), and its last state.

    Takes the arguments of transformers' `torch_chunk_gated_delta_rule` and can stand in for it. Computes in float32, or in
    float64 where the inputs are; the output has the dtype of `query`.

    Args:
        g: Logarithm of the decay, at most 0.
        chunk_size: Tokens handled at once; a power of two.
    """
    settings = {"chunk_size": chunk_size, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    segment = _segment(value, chunk_size)
    if not torch.is_grad_enabled() and key.shape[1] > segment:
        # long inputs piece by piece: all chunks side by side would hold a state for each
        out, state = [], initial_state
        for part in zip(*(x.split(segment, 1) for x in (query, key, value, g, beta)), strict=True):
            piece, state = chunk_gated_delta_rule(*part, initial_state=state, output_final_state=True, **settings)
            out.append(piece)
        return torch.cat(out, 1), state if output_final_state else None
    dtype, length, repeat = query.dtype, key.shape[1], value.shape[2] // key.shape[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        if repeat > 1:
            query, key = query.repeat_interleave(repeat, 2), key.repeat_interleave(repeat, 2)
        q, k, v, g, beta = (x.transpose(1, 2).to(wide) for x in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = _l2norm(q), _l2norm(k)
        q = q * q.shape[-1] ** -0.5
        if pad := -length % chunk_size:
            q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
            g, beta = F.pad(g, (0, pad)), F.pad(beta, (0, pad))
        q, k, v = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v))  # [batch, heads, chunks, chunk, dim]
        g, beta = g.unflatten(2, (-1, chunk_size)).cumsum(-1), beta.unflatten(2, (-1, chunk_size))
        within, last = _decay(g), g[..., -1:]
        k_beta = k * beta[..., None]
        inverse = _unit_inverse((k_beta @ k.mT * within).tril(-1))
        u, w = inverse @ (v * beta[..., None]), inverse @ (k_beta * g.exp()[..., None])
        k_out = (k * (last - g).exp()[..., None]).mT
        eye = torch.eye(k.shape[-1], dtype=wide, device=k.device)
        state = u.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state.to(wide)
        states, final = _states(last.exp()[..., None] * eye - k_out @ w, k_out @ u, state)
        out = (q * g.exp()[..., None]) @ states + (q @ k.mT * within) @ (u - w @ states)
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype), final if output_final_state else None


def _segment(value: Float[Tensor, "batch len v_heads v_dim"], chunk_size: int) -> int:
    """Tokens, a multiple of the chunk, whose values take 32 MiB in float32 (512 MiB on a GPU)."""
    per_token = 4 * value.shape[0] * value.shape[2] * value.shape[3]
    return max((2**29 if value.is_cuda else 2**25) // per_token // chunk_size, 8) * chunk_size


def _l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _decay(g: Float[Tensor, "*lead chunk"]) -> Float[Tensor, "*lead chunk chunk"]:
    """exp(g_i - g_j) for j <= i, else 0; the difference is masked first, for exp of a positive one may overflow."""
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    return (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp()


def _unit_inverse(lower: Float[Tensor, "*lead chunk chunk"]) -> Float[Tensor, "*lead chunk chunk"]:
    """(1 + L)^-1 of a strictly lower triangular L, from inverses of diagonal blocks of 1, 2, 4, ... rows.

    [[A, 0], [B, C]]^-1 = [[A', 0], [-C' B A', C']], for all blocks at once. Powers of L would be fewer lines, but they grow
    like binomial coefficients where keys repeat, and float32 then loses everything.
    """
    size = lower.shape[-1]
    inverse = torch.eye(size, dtype=lower.dtype, device=lower.device)
    at = torch.arange(size, device=lower.device)
    rows = 1
    while rows < size:
        block = at // rows
        below = (block[:, None] % 2 == 1) & (block[:, None] == block + 1)
        inverse = inverse - inverse @ (lower * below) @ inverse
        rows *= 2
    return inverse


def _states(
    m: Float[Tensor, "batch heads chunks k_dim k_dim"],
    u: Float[Tensor, "batch heads chunks k_dim v_dim"],
    state: Float[Tensor, "batch heads k_dim v_dim"],
) -> tuple[Float[Tensor, "batch heads chunks k_dim v_dim"], Float[Tensor, "batch heads k_dim v_dim"]]:
    """The state before each chunk, and the last, of S <- m S + u: prefixes within groups side by side, then group after group."""
    chunks, k_dim = m.shape[2], m.shape[-1]
    group = isqrt(max(chunks - 1, 0)) + 1
    eye = torch.eye(k_dim, dtype=m.dtype, device=m.device)
    if pad := -chunks % group:
        m = torch.cat([m, eye.expand(*m.shape[:2], pad, k_dim, k_dim)], 2)
        u = F.pad(u, (0, 0, 0, 0, 0, pad))
    m, u = m.unflatten(2, (-1, group)), u.unflatten(2, (-1, group))
    products, sums = [eye.expand_as(m[:, :, :, 0])], [torch.zeros_like(u[:, :, :, 0])]
    for i in range(group):
        products.append(m[:, :, :, i] @ products[-1])
        sums.append(m[:, :, :, i] @ sums[-1] + u[:, :, :, i])
    entering = []
    for i in range(m.shape[2]):
        entering.append(state)
        state = products[-1][:, :, i] @ state + sums[-1][:, :, i]
    entering = torch.stack(entering, 2)[:, :, :, None]
    before = torch.stack(products[:-1], 3) @ entering + torch.stack(sums[:-1], 3)
    return before.flatten(2, 3)[:, :, :chunks], state
