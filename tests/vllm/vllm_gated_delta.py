"""The gated delta rule of vLLM's CPU engine in float32, one token at a time: its own wants bfloat16."""

import torch
import torch.nn.functional as F

__all__ = ["gated_delta_float32"]


def gated_delta_float32(mixed_qkv, b, a, out, layer_name):
    """Stands in for `torch.ops.vllm.cpu_gdn_attention_core`."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    layer = context.no_compile_layers[getattr(layer_name, "value", layer_name)]
    if context.attn_metadata is None:
        return
    metadata = context.attn_metadata[layer.prefix]
    if not metadata.num_actual_tokens:
        return
    conv, state = layer.kv_cache[0], layer.kv_cache[1]
    weight = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight)
    weight = weight.view(weight.shape[0], -1)
    starts = metadata.non_spec_query_start_loc.tolist()
    slots = metadata.non_spec_state_indices_tensor.tolist()
    known = metadata.has_initial_state
    for i in range(metadata.num_decodes + metadata.num_prefills):
        lo, hi, slot = starts[i], starts[i + 1], slots[i]
        if i >= metadata.num_decodes and not bool(known[i]):
            conv[slot], state[slot] = 0, 0
        # [width - 1, channels], whatever the order in memory
        before = conv[slot] if conv.shape[-1] == weight.shape[0] else conv[slot].T
        rows = torch.cat([before, mixed_qkv[lo:hi]])
        before.copy_(rows[-before.shape[0] :].clone())
        mixed = F.silu(sum(rows[j : j + hi - lo] * weight[:, j] for j in range(weight.shape[1])))
        out[lo:hi] = _recur(layer, mixed, b[lo:hi], a[lo:hi], state[slot])


def _recur(layer, mixed, b, a, state):
    q, k, v = (x[0] for x in layer.rearrange_mixed_qkv(mixed))
    repeat = v.shape[1] // k.shape[1]
    q, k = (F.normalize(x, dim=-1, eps=1e-6).repeat_interleave(repeat, 1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    decay = (-layer.A_log.exp() * F.softplus(a + layer.dt_bias)).exp()
    beta = b.sigmoid()
    held, rows = state.float(), []
    for t in range(q.shape[0]):
        held = held * decay[t, :, None, None]
        change = (v[t] - torch.einsum("hvk,hk->hv", held, k[t])) * beta[t, :, None]
        held = held + torch.einsum("hv,hk->hvk", change, k[t])
        rows.append(torch.einsum("hvk,hk->hv", held, q[t]))
    state.copy_(held)
    return torch.stack(rows)
