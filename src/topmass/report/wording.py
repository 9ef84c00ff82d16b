"""Words and numbers that reports of evaluations, gaps and audits have in common."""

from topmass.report.aggregate import Setting, budget_name
from topmass.results.stats import Interval

__all__ = ["ENOUGH", "NOT_CAUSAL", "budget_words", "granularity_words", "interval_points", "points"]

NOT_CAUSAL = "selection looks at the block's later queries: not causal"
ENOUGH = "at most 1 point below dense, with the upper end of the 95 % interval at 2 points or less"


def points(fraction: float) -> str:
    """A fraction of the full score in points.

    Example:
        >>> points(0.0123), points(-0.02), points(-0.0001)
        ('1.2', '-2.0', '0.0')
    """
    text = f"{fraction * 100:+.1f}" if fraction < 0 else f"{fraction * 100:.1f}"
    return "0.0" if text == "-0.0" else text


def interval_points(found: Interval | None) -> str:
    """A score or a difference of scores in points, with its interval; empty where there is none.

    Example:
        >>> interval_points(Interval(point=0.012, low=-0.001, high=0.025, clusters=4, samples=8, method="bootstrap"))
        '1.2 [-0.1, 2.5]'
    """
    return "" if found is None else f"{points(found.point)} [{points(found.low)}, {points(found.high)}]"


def budget_words(setting: Setting) -> str:
    """The nominal budget of a setting, in a sentence."""
    budget = setting.budget or "?"
    if budget.startswith("plan("):
        return f"{budget_name(budget)} keys by layer"
    return (
        f"{int(budget):,} keys" if budget.isdigit() else f"{budget} of the keys" if "%" in budget else f"{budget} keys"
    )


def granularity_words(size: tuple[int, int]) -> str:
    """Queries that share a selection and keys taken together, in a table.

    Example:
        >>> granularity_words((1, 1)), granularity_words((32, 4))
        ('per query, tokens', '32 queries share, groups of 4')
    """
    queries = "per query" if size[0] == 1 else f"{size[0]} queries share"
    keys = "tokens" if size[1] == 1 else f"groups of {size[1]}"
    return f"{queries}, {keys}"
