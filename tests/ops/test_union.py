"""Tile unions against sets of Python integers, for every backend."""

import pytest
import torch

import topmass
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import INTERPRETED
from topmass.ops.tile_union import TileUnion, _triton, tile_union
from topmass.testing import random_support

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [b for b in _dispatch.available("tile_union") if b == "reference" or INTERPRETED or DEVICE == "cuda"]


def make(g: int, r: int, *, budget: int, q_start: int, q_len: int, heads: int = 1, dense_below: int = 0) -> Support:
    rule = topmass.SupportRule(
        budget=topmass.Budget(tokens=budget),
        granularity=topmass.Granularity(q_block=g, kv_block=r, share="kv_head" if heads > 1 else "layer"),
        window=3,
        dense_below=dense_below,
    )
    return random_support(
        rule,
        q_len=q_len,
        q_start=q_start,
        batch=2,
        share_heads=heads,
        growth=2.5,
        tile=max(g, 8),
        span=24,
        device=DEVICE,
    )


def expected(support: Support, tile: int) -> list[dict[int, int]]:
    g, end = support.granularity.q_block, support.q_start + support.q_len
    first_block, first_tile = support.q_start // g, support.q_start // tile
    n_tiles = -(-end // tile) - first_tile
    tables = []
    for rows, counts in zip(support.groups.flatten(0, 1).tolist(), support.counts.flatten(0, 1).tolist(), strict=True):
        tables += [{} for _ in range(n_tiles)]
        for i, (ids, count) in enumerate(zip(rows, counts, strict=True)):
            start = (first_block + i) * g
            if min(start + g, end) > support.dense_len[i]:
                table = tables[start // tile - first_tile - n_tiles]
                for j in ids[:count]:
                    table[j] = table.get(j, 0) | 1 << start % tile // g
    return tables


def found(union: TileUnion) -> list[dict[int, int]]:
    def row(ids: list[int], words: list[int], count: int) -> dict[int, int]:
        assert ids[:count] == sorted(set(ids[:count]))
        return {j: w & 0xFFFFFFFF for j, w in zip(ids[:count], words[:count], strict=True)}

    flat = (x.flatten(0, 2).tolist() for x in (union.ids, union.words, union.counts))
    return [row(*x) for x in zip(*flat, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("g", "r", "tile", "q_start", "q_len", "heads"),
    [
        (1, 1, 32, 0, 37, 1),
        (1, 4, 32, 61, 45, 2),
        (1, 2, 16, 33, 1, 1),
        (4, 1, 128, 129, 131, 1),
        (8, 16, 32, 90, 71, 2),
        (16, 1, 16, 40, 33, 1),
    ],
)
def test_union_equals_sets(g: int, r: int, tile: int, q_start: int, q_len: int, heads: int, backend: str) -> None:
    support = make(g, r, budget=8 * r + g + 3, q_start=q_start, q_len=q_len, heads=heads)

    union = tile_union(support, tile=tile, backend=backend)

    assert found(union) == expected(support, tile)
    assert union.tile == tile


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_is_used(backend: str) -> None:
    support = make(1, 1, budget=12, q_start=224, q_len=32)

    words = tile_union(support, tile=32, backend=backend).words

    assert (words < 0).any(), "the last query is bit 31, the sign"


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_read_everything_have_no_list(backend: str) -> None:
    support = make(4, 1, budget=12, q_start=0, q_len=90, dense_below=50)

    union = tile_union(support, tile=16, backend=backend)

    assert found(union) == expected(support, 16)
    assert (union.counts[..., :3] == 0).all()
    # the block of queries 48 to 51 has two that do not read everything
    partly = found(union)[3 :: union.counts.shape[-1]]
    assert all(any(word & 1 for word in row.values()) for row in partly)


@pytest.mark.parametrize("backend", BACKENDS)
def test_support_without_groups(backend: str) -> None:
    rule = topmass.SupportRule(budget=None, window=4, sink=1)
    support = random_support(rule, q_len=40, device=DEVICE)

    union = tile_union(support, tile=32, backend=backend)

    assert union.ids.shape == (1, 1, 2, 0)
    assert (union.counts == 0).all()


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton backend can run here")
@pytest.mark.parametrize("q_start", [0, 41])
def test_chunks_of_tiles_equal_one_pass(q_start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    support = make(2, 1, budget=12, q_start=q_start, q_len=75, heads=2)
    whole = found(tile_union(support, tile=8, backend="triton"))

    monkeypatch.setattr(_triton, "WORD_BYTES", 1 << 12)

    assert found(tile_union(support, tile=8, backend="triton")) == whole


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton backend can run here")
def test_scattered_selections() -> None:
    support = make(1, 2, budget=20, q_start=3, q_len=40)
    wide = torch.full((*support.groups.shape[:3], 2 * support.groups.shape[3]), -7, dtype=torch.int32, device=DEVICE)
    wide[..., ::2] = support.groups
    object.__setattr__(support, "groups", wide[..., ::2])

    assert found(tile_union(support, tile=16, backend="triton")) == expected(support, 16)


@pytest.mark.parametrize(("g", "tile"), [(4, 2), (1, 64), (2, 24), (1, 0)])
def test_impossible_tiles_are_named(g: int, tile: int) -> None:
    support = make(g, 1, budget=20, q_start=0, q_len=8)

    with pytest.raises(ConfigError, match=r"tile must be a power of two|A tile holds 1 to 32 query blocks"):
        tile_union(support, tile=tile)
