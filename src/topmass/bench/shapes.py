"""Attention shapes of known models, by name."""

import difflib
import re
from dataclasses import dataclass

from topmass.errors import ConfigError

__all__ = ["SHAPES", "Shape", "shape_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads and head dimension of one full-attention layer.

    Attributes:
        name: What users pass as `--shape`.
        q_heads: Query heads.
        kv_heads: Heads of keys and values, a divisor of `q_heads`.
        head_dim: Width of every head.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads} heads x {self.head_dim}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3.5-9b", q_heads=16, kv_heads=4, head_dim=256),
        Shape(name="qwen3.5-0.8b", q_heads=8, kv_heads=2, head_dim=256),
        Shape(name="qwen3-8b", q_heads=32, kv_heads=8, head_dim=128),
        Shape(name="llama-3.1-8b", q_heads=32, kv_heads=8, head_dim=128),
        Shape(name="reference", q_heads=8, kv_heads=2, head_dim=128),
    )
}


def shape_of(name: str) -> Shape:
    """Return a shape by its name, or one written as `q_heads/kv_headsxhead_dim`.

    Raises:
        ConfigError: There is no such shape, or its heads do not divide.

    Example:
        >>> str(shape_of("qwen3.5-9b")), shape_of("6/2x64").kv_heads
        ('16/4 heads x 256', 2)
    """
    if name in SHAPES:
        return SHAPES[name]
    if found := re.fullmatch(r"(\d+)/(\d+)x(\d+)", name):
        q_heads, kv_heads, head_dim = map(int, found.groups())
        if not kv_heads or not head_dim or not q_heads or q_heads % kv_heads:
            raise ConfigError(f"q_heads must be a multiple of kv_heads, and no number 0, got {name!r}.")
        return Shape(name=name.replace("/", "-"), q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    near = difflib.get_close_matches(name, SHAPES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SHAPES)}; or write it as 16/4x256."
    raise ConfigError(f"Unknown shape {name!r}; {hint}")
