"""Per-layer budgets, as an audit recommends them."""

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
        inner = ", ".join(f"{i}:{b or 'dense'}" for i, b in sorted(self.layers.items()))
        return f"plan({inner})"

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML."""
        lines = [
            f"version = {VERSION}",
            f"note = {_quote(self.note)}",
            f"default = {_quote(str(self.default or 'dense'))}",
        ]
        lines += ["", "[layers]", *(f"{i} = {_quote(str(b or 'dense'))}" for i, b in sorted(self.layers.items()))]
        Path(path).write_text("\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan written by `save`.

        Raises:
            ConfigError: The file is missing, not TOML, of another version, or holds an unknown key.
        """
        try:
            data = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"Cannot read the plan {path}: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not a plan: {error}.") from error
        if unknown := set(data) - {"version", "note", "default", "layers"}:
            raise ConfigError(f"{path}: unknown key {min(unknown)!r}; a plan has version, note, default, layers.")
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{path}: version {data.get('version')!r} of a plan; this topmass reads version {VERSION}."
            )
        try:
            layers = {int(i): _budget(b) for i, b in data.get("layers", {}).items()}
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls(layers=layers, default=_budget(data.get("default", "dense")), note=data.get("note", ""))


def _budget(text: str | int) -> Budget | None:
    return None if text == "dense" else Budget.parse(text)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
