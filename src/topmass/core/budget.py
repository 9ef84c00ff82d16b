"""How many keys a query may read."""

import re
from dataclasses import dataclass
from fractions import Fraction

from topmass.errors import ConfigError

__all__ = ["Budget", "BudgetLike"]

_MASS = re.compile(r"mass:(?P<mass>[0-9./]+)\s*<=\s*(?P<cap>[0-9]+)")
_SHARE = re.compile(r"(?P<percent>[0-9./]+)\s*%")
# numerator x position has to fit int64 for contexts of millions of tokens
_LARGEST_DENOMINATOR = 10**12
_SYNTAX = "write tokens (2048), a share of the visible keys ('5%'), or mass with its cap ('mass:0.95<=4096')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Keys read per query: a number of tokens, a share of the visible keys, or as many as hold a given mass.

    Exactly one of three forms: `tokens` alone; `share` alone; `mass` together with `tokens`, its cap.

    Attributes:
        tokens: Keys per query, sink and window included; the cap when `mass` is set.
        share: Keys per query as an exact fraction of the visible keys, in (0, 1].
        mass: Attention mass to retain, in (0, 1].

    Raises:
        ConfigError: The form or a value is not one of the above.

    Example:
        >>> Budget.parse("5%").share
        Fraction(1, 20)
        >>> str(Budget.parse("mass:0.95<=4096"))
        'mass:0.95<=4096'
    """

    tokens: int | None = None
    share: Fraction | None = None
    mass: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None) or (self.mass is not None and self.tokens is None):
            raise ConfigError(f"A budget has one form: {_SYNTAX}.")
        if self.tokens is not None and type(self.tokens) is not int:
            raise ConfigError(f"A budget's tokens are a whole number, got {self.tokens!r}.")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"A budget needs at least 1 token, got {self.tokens}.")
        for name in ("share", "mass"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Fraction):
                raise ConfigError(
                    f"A budget's {name} is a Fraction, got {value!r}; Budget.parse reads text such as '5%'."
                )
            if not 0 < value <= 1:
                raise ConfigError(f"A budget's {name} must lie in (0, 1], got {value}.")
            if value.denominator > _LARGEST_DENOMINATOR:
                raise ConfigError(f"A budget's {name} has too many digits: {value}; round it to ten decimals.")

    @classmethod
    def parse(cls, value: "BudgetLike") -> "Budget":
        """Read a budget from what users write: `2048`, `"2048"`, `"5%"` or `"mass:0.95<=4096"`."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(tokens=value)
        if isinstance(value, str):
            text = value.strip()
            if text.isdecimal():
                return cls(tokens=int(text))
            try:
                if found := _SHARE.fullmatch(text):
                    return cls(share=Fraction(found["percent"]) / 100)
                if found := _MASS.fullmatch(text):
                    return cls(mass=Fraction(found["mass"]), tokens=int(found["cap"]))
            except (ValueError, ZeroDivisionError) as error:
                if isinstance(error, ConfigError):
                    raise
        raise ConfigError(f"Cannot read the budget {value!r}: {_SYNTAX}.")

    def __str__(self) -> str:
        if self.mass is not None:
            return f"mass:{_exact(self.mass)}<={self.tokens}"
        if self.share is not None:
            return f"{_exact(self.share * 100)}%"
        return str(self.tokens)


def _exact(value: Fraction) -> str:
    # fingerprints and saved plans are made of this text, so it may not round
    text = f"{float(value):.12f}".rstrip("0").rstrip(".")
    return text if Fraction(text) == value else str(value)


BudgetLike = int | str | Budget
