"""The oracle: selects by the model's own attention mass. A diagnostic with hindsight, not an accelerator."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.errors import DataError
from topmass.selection.base import AttentionInputs, RankedSelector

__all__ = ["OracleSelector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleSelector(RankedSelector):
    """Top-k by attention mass: dense attention, averaged over the heads that share a selection (arXiv 2606.07703).

    The attention is then recomputed on that support only. The oracle costs more than dense attention; it says what the
    best selection with a given budget would keep.

    Example:
        >>> OracleSelector(budget="5%").fingerprint == OracleSelector(budget="5.0 %").fingerprint
        True
    """

    name: ClassVar[str] = "oracle"

    def group_scores(
        self, inputs: AttentionInputs, rule: SupportRule
    ) -> tuple[
        Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_blocks groups"] | None
    ]:
        scores, total = inputs.mass(rule.granularity, self.pool)
        check_totals(total, layer=inputs.layer, has_sinks=inputs.sinks is not None)
        if rule.budget is None or rule.budget.mass is None:
            return scores, None
        return scores, scores if self.pool == "sum" else inputs.mass(rule.granularity)[0]

    def score_heads(self, q_heads: int, kv_heads: int) -> int:
        # the mass, and what the top-k needs beside it
        return min(2 * self.granularity.share_heads(q_heads, kv_heads), q_heads)


def check_mass(mass: Float[Tensor, "batch share_heads q_len kv_len"], *, layer: int, has_sinks: bool = False) -> None:
    """Refuse rows that are not a distribution.

    Raises:
        DataError: A row holds NaN or does not sum to 1.
    """
    check_totals(mass.sum(-1), layer=layer, has_sinks=has_sinks)


def check_totals(total: Float[Tensor, "batch share_heads q_len"], *, layer: int, has_sinks: bool = False) -> None:
    """Refuse rows that do not sum to 1, as `check_mass` does."""
    good = (total < 1 + 1e-3) & (total > (-1e-3 if has_sinks else 1 - 1e-3))
    if not bool(good.all()):
        raise DataError(
            f"Attention of layer {layer} is not a distribution (a row sums to {total[~good][0].item():g}): the weights "
            "or the input hold NaN or infinity; check the checkpoint."
        )
