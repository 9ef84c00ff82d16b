"""How many keys a query may read."""

import re
from dataclasses import dataclass
from fractions import Fraction

from topmass.errors import ConfigError

__all__ = ["Budget", "BudgetLike"]

_MASS = re.compile(r"mass:(?P<mass>[0-9.eE+-]+)\s*<=\s*(?P<cap>\d+)")
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
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"A budget needs at least 1 token, got {self.tokens}.")
        for name in ("share", "mass"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"A budget's {name} must lie in (0, 1], got {float(value):g}.")

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
                if text.endswith("%"):
                    return cls(share=Fraction(text[:-1].strip()) / 100)
                if found := _MASS.fullmatch(text):
                    return cls(mass=Fraction(found["mass"]), tokens=int(found["cap"]))
            except (ValueError, ZeroDivisionError) as error:
                if isinstance(error, ConfigError):
                    raise
        raise ConfigError(f"Cannot read the budget {value!r}: {_SYNTAX}.")

    def __str__(self) -> str:
        if self.mass is not None:
            return f"mass:{float(self.mass):g}<={self.tokens}"
        if self.share is not None:
            return f"{float(self.share * 100):g}%"
        return str(self.tokens)


BudgetLike = int | str | Budget
