"""Definition of the KL of score rows from mass rows in plain PyTorch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["kl_rows_reference"]


def kl_rows_reference(
    mass: Float[Tensor, "batch rows groups"],
    scores: Float[Tensor, "batch rows groups"],
    *,
    first: int,
    stop: Int[Tensor, " rows"],
    wants_slope: bool,
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows groups"] | None]:
    """Loss of every row, and its gradient with respect to the scores."""
    group = torch.arange(scores.shape[-1], device=scores.device)
    seen = (group >= first) & (group < stop.to(scores.device)[:, None])
    target = mass.masked_fill(~seen, 0.0)
    total = target.sum(-1, keepdim=True)
    live = total > 0
    target = target / total.masked_fill(~live, 1.0)
    log_q = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
    loss = (torch.xlogy(target, target) - target * log_q).sum(-1)
    return loss, (log_q.exp() - target).masked_fill(~(seen & live), 0.0) if wants_slope else None
