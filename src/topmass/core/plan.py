"""Per-layer budgets, as an audit recommends them."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from topmass.core.budget import Budget
from topmass.errors import ConfigError

__all__ = ["Plan"]

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A budget for each full-attention layer.

    Attributes:
        layers: Budget by layer index; `None` keeps the layer dense.
        default: Budget of layers that `layers` does not name; `None` keeps them dense.
        note: Where the plan comes from, one line.

    Example:
        >>> plan = Plan(layers={3: Budget(tokens=256)}, default=Budget(tokens=1024))
        >>> str(plan.budget(3)), str(plan.budget(7))
        ('256', '1024')
    """

    layers: Mapping[int, Budget | None]
    default: Budget | None = None
    note: str = ""
    version: int = field(default=VERSION, kw_only=True)

    def budget(self, layer: int) -> Budget | None:
        """Budget of `layer`, or `None` if it stays dense."""
        return self.layers.get(layer, self.default)

    def __str__(self) -> str:
        each = [*sorted(self.layers.items()), ("default", self.default)]
        return "plan(" + ", ".join(f"{layer}:{budget or 'dense'}" for layer, budget in each) + ")"

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML.

        Raises:
            ConfigError: The file cannot be written.
        """
        lines = [
            f"version = {VERSION}",
            f"note = {_quote(self.note)}",
            f"default = {_quote(str(self.default or 'dense'))}",
        ]
        lines += ["", "[layers]", *(f"{i} = {_quote(str(b or 'dense'))}" for i, b in sorted(self.layers.items()))]
        try:
            Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"Cannot write the plan {path}: {error.strerror}; choose another file.") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan written by `save`.

        Raises:
            ConfigError: The file is missing, not TOML, of another version, or holds an unknown key.
        """
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the plan {path}: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not a plan: {error}.") from error
        if unknown := set(data) - {"version", "note", "default", "layers"}:
            raise ConfigError(f"{path}: unknown key {min(unknown)!r}; a plan has version, note, default, layers.")
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{path}: version {data.get('version')!r} of a plan; this topmass reads version {VERSION}."
            )
        layers = data.get("layers", {})
        if not isinstance(layers, dict) or not all(i.isdecimal() for i in layers):
            raise ConfigError(f"{path}: [layers] maps layer indices (0, 1, ...) to budgets.")
        try:
            return cls(
                layers={int(i): _budget(b) for i, b in layers.items()},
                default=_budget(data.get("default", "dense")),
                note=str(data.get("note", "")),
            )
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _budget(value: object) -> Budget | None:
    return None if value == "dense" else Budget.parse(value if isinstance(value, int) else str(value))


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but TOML forbids a bare DEL
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
