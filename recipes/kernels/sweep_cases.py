"""What the sweep of launch settings times: calls of four ops, with the settings that each is tried with."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
import triton
from torch import Tensor

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.core.tables import block_tables
from topmass.ops._triton_common import INTERPRETED
from topmass.ops.attention_mass import _triton as mass_kernels
from topmass.ops.index_topk import _triton as index_kernels
from topmass.ops.sparse_prefill import _triton as sparse_kernels
from topmass.ops.topk_support import _triton as select_kernels

__all__ = ["DEVICE", "Attend", "Case", "Config", "Draw", "Mass", "Scores", "Select", "Work", "plan"]

K = 1024
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
# float32 values of a tile that a thread can hold
MOST_VALUES = 192
Config = dict[str, int]


class Work:
    """A case with its tensors: `run` is what is timed, `result` what is compared, `error` how far apart two results are.

    `error` returns the difference in units of what rounding explains, and the number of values that differ at all.
    """

    def __init__(
        self,
        run: Callable[[Config], Any],
        error: Callable[[Any, Any], tuple[float, int]],
        result: Callable[[Config], Any] | None = None,
    ) -> None:
        self.run, self.error, self.result = run, error, result or run


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of one op, and the launch settings it is tried with.

    Attributes:
        most: Candidates, the nearest to today's first.
    """

    op: ClassVar[str]
    options: ClassVar[dict[str, tuple[int, ...]]]
    length: int
    budget: int = 2048
    sink: int = 64
    window: int = 256
    most: int = 8

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Entry of the op's table that the case reads."""
        raise NotImplementedError

    def today(self) -> Config:
        """Settings that the op's table gives."""
        raise NotImplementedError

    def hopeless(self, config: Config, room: int) -> bool:
        """Whether shared memory or registers cannot hold the tile."""
        return False

    def open(self, draw: "Draw") -> Work:
        """Make the tensors."""
        raise NotImplementedError

    def rule(self, q_block: int, kv_block: int) -> SupportRule:
        unit = Granularity(q_block=q_block, kv_block=kv_block)
        return SupportRule(budget=Budget.parse(self.budget), granularity=unit, sink=self.sink, window=self.window)

    def candidates(self, room: int) -> list[Config]:
        """Today's settings, then the others in the order of their distance from them."""
        today = self.today()
        every = [dict(zip(self.options, values, strict=True)) for values in itertools.product(*self.options.values())]
        others = [c for c in every if c != today and not self.hopeless(c, room)]
        return [today, *sorted(others, key=lambda c: _distance(c, today))][: self.most]


def _distance(a: Config, b: Config) -> float:
    return sum(abs(a[n] - b[n]) if n == "stages" else abs(math.log2(a[n] / b[n])) for n in a)


class Draw:
    """Makes random tensors, or empty ones that no kernel reads, for compilation."""

    def __init__(self, device: str, *, empty: bool = False) -> None:
        self.device, self.empty = device, empty
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, dtype: torch.dtype = HALF) -> Tensor:
        if self.empty:
            return torch.empty(*size, dtype=dtype, device=self.device)
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=dtype)

    def support(self, rule: SupportRule, length: int) -> Support:
        """Ascending random groups; per query, the rows of 32 tokens share two thirds of theirs: U/K is 1.5."""
        first, stops, wants, *_, wanted = block_tables(rule, 0, length, self.device)
        groups = torch.empty(stops.numel(), wanted, dtype=torch.int32, device=self.device)
        for a in range(0, 0 if self.empty else stops.numel(), 16 * K):
            part = slice(a, a + 16 * K)
            groups[part] = self._groups(stops[part], first, wanted, rule.granularity.q_block)
        if not self.empty:
            slots = torch.arange(wanted, device=self.device)
            groups.masked_fill_(slots >= wants[:, None], -1)
        return Support.from_groups(groups[None, None], wants[None, None], rule=rule, q_start=0, q_len=length)

    def _groups(self, stops: Tensor, first: int, wanted: int, q_block: int) -> Tensor:
        """Of a few rows: a pool is drawn for each 32 tokens, one group of every step; a row takes part of it."""
        per_query = q_block < 32
        pool = wanted + wanted // 2 * per_query
        rows = torch.arange(stops.numel(), device=self.device)
        own = rows * q_block // 32
        # the range of the first of 32 serves all
        span = (stops[torch.searchsorted(own, own)] - first).long()[:, None]
        jitter = torch.rand(int(own[-1]) + 1, pool, generator=self.generator, device=self.device)[own]
        slots = torch.arange(pool, device=self.device)
        low, high = slots * span // pool, (slots + 1) * span // pool
        ids = (first + low + (0.999 * jitter * (high - low)).long()).int()
        if per_query:
            chance = torch.rand(stops.numel(), pool, generator=self.generator, device=self.device)
            ids = ids.gather(1, chance.topk(wanted, 1).indices.sort(1).values)
        # a row with few candidates takes them all
        return torch.where(span >= pool, ids, (first + slots[:wanted]).int())


# -- the ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend(Case):
    """sparse_prefill."""

    op = "sparse_prefill"
    options = {"rows": (128, 64), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4, 5)}  # noqa: RUF012
    q_heads: int
    kv_heads: int
    dim: int
    q_block: int
    kv_block: int

    @property
    def name(self) -> str:
        return f"{self.q_heads}/{self.kv_heads} x {self.dim}, {_unit(self.q_block, self.kv_block)}"

    @property
    def key(self) -> str:
        return f"{self.op} {_padded(self.dim, 16)}"

    def tile(self) -> sparse_kernels.Tile:
        device = torch.device("cuda") if torch.cuda.is_available() and not INTERPRETED else None
        return sparse_kernels.tile_for(self.q_heads // self.kv_heads, self.dim, self.dim, self.q_block, device=device)

    def today(self) -> Config:
        tile = self.tile()
        return {"rows": tile.tokens * tile.heads, "keys": tile.keys, "warps": tile.warps, "stages": tile.stages}

    def hopeless(self, config: Config, room: int) -> bool:
        rows, keys, warps, stages = config.values()
        bd = _padded(self.dim, 16)
        return 2 * bd * (rows + 2 * stages * keys) > room or rows * (bd + keys) > 32 * warps * MOST_VALUES

    def open(self, draw: Draw) -> Work:
        q, k, v = (draw.normal(1, self.length, h, self.dim) for h in (self.q_heads, self.kv_heads, self.kv_heads))
        support = draw.support(self.rule(self.q_block, self.kv_block), self.length)
        heads = sparse_kernels.tile_for(self.q_heads // self.kv_heads, self.dim, self.dim, self.q_block).heads

        def run(config: Config) -> tuple[Tensor, Tensor]:
            rows, *rest = config.values()
            return sparse_kernels.attend(
                q, k, v, support, scale=self.dim**-0.5, tile=sparse_kernels.Tile(rows // heads, heads, *rest)
            )

        return Work(run, self.error)

    @staticmethod
    def error(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, int]:
        """Relative error of the worst row, in units of 2**-7, or of its normaliser, in units of 2**-10."""
        worst, differing = 0.0, 0
        for x, y in zip(a[0].split(8 * K, 1), b[0].split(8 * K, 1), strict=True):
            gap = (x.float() - y.float()).norm(dim=-1) / y.float().norm(dim=-1)
            worst, differing = max(worst, _largest(gap) * 2**7), differing + int((x != y).sum())
        return max(worst, _largest((a[1] - b[1]).abs()) * 2**10), differing


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores(Case):
    """Scores of index_topk, chunk by chunk as the op makes them."""

    op = "index_topk"
    options = {"rows": (64, 128, 256), "keys": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4)}  # noqa: RUF012
    dim: int
    q_block: int
    kv_block: int
    reduce: str | None
    heads: int = 1

    @property
    def name(self) -> str:
        return f"{self.heads} x {self.dim}, {self.reduce or 'unreduced'} {_unit(self.q_block, self.kv_block)}"

    @property
    def key(self) -> str:
        summed = " of heads' sums" if self.heads > 1 else ""
        return f"{self.op} {self.reduce or 'unreduced'}{summed} {_padded(self.dim, 32)}"

    def per_block(self) -> int:
        return triton.next_power_of_2(self.heads) * (1 if self.reduce is None else self.q_block)

    def today(self) -> Config:
        return index_kernels._tile(self.rule(self.q_block, self.kv_block), self.heads, self.dim, self.reduce)._asdict()

    def hopeless(self, config: Config, room: int) -> bool:
        rows, keys, warps, stages = config.values()
        needs = 2 * _padded(self.dim, 32) * (rows + stages * keys)
        return rows < self.per_block() or needs > room or rows * keys > 32 * warps * 128

    def open(self, draw: Draw) -> Work:
        n, rule = self.length, self.rule(self.q_block, self.kv_block)
        stops = block_tables(rule, 0, n, draw.device).stops
        iq, ik = draw.normal(1, n, self.heads, self.dim), draw.normal(1, n // self.kv_block, 1, self.dim)[:, :, 0]
        dtype = torch.float32 if self.reduce == "mean" else torch.float16
        # the largest tile's, so that all candidates have the same chunks
        chunks = list(index_kernels._chunks(rule, 0, n, 1, tile=max(256 // self.per_block(), 1), size=dtype.itemsize))
        buffer = torch.empty(max(rows * _whole(stop) for _, _, rows, stop in chunks), dtype=dtype, device=draw.device)
        first, _ = rule.candidate_range(torch.tensor([0]))

        def score(config: Config, chunks: list[Any]) -> Tensor:
            tile = index_kernels._Tile(**config)
            with mock.patch.object(index_kernels, "_tile", return_value=tile):
                for _, block, rows, stop in chunks:
                    scores = buffer[: rows * _whole(stop)].view(1, rows, -1)
                    index_kernels._score(
                        iq, ik, stops, scores, rule=rule, q_start=0, block=block, stop=stop, reduce=self.reduce,
                        score_dtype=torch.float16, pages=None,
                    )  # fmt: skip
            return scores

        def result(config: Config) -> Tensor:
            # the first chunk is the last rows
            scores, block = score(config, chunks[:1])[0], chunks[0][1]
            o_n = torch.arange(scores.shape[1], device=scores.device)
            hidden = (o_n < first) | (o_n >= stops[block : block + scores.shape[0], None])
            return scores.masked_fill(hidden, 0.0)

        return Work(lambda config: score(config, chunks), self.error, result)

    @staticmethod
    def error(a: Tensor, b: Tensor) -> tuple[float, int]:
        """Error in units of two roundings to float16."""
        worst, differing = 0.0, 0
        for x, y in zip(a.split(K), b.split(K), strict=True):
            gap = (x.float() - y.float()).abs() / y.float().abs().clamp_min(1.0)
            worst, differing = max(worst, _largest(gap) * 2**9), differing + int((x != y).sum())
        return worst, differing


@dataclass(frozen=True, slots=True, kw_only=True)
class Select(Case):
    """Selection of index_topk and topk_support, chunk by chunk."""

    op = "topk_support"
    options = {"keys_per_warp": (512, 1024, 2048)}  # noqa: RUF012
    q_block: int
    kv_block: int

    @property
    def name(self) -> str:
        return f"{_unit(self.q_block, self.kv_block)}, {self.length} tokens"

    @property
    def key(self) -> str:
        return self.op

    def today(self) -> Config:
        return {"keys_per_warp": select_kernels.KEYS_PER_WARP}

    def open(self, draw: Draw) -> Work:
        rule = self.rule(self.q_block, self.kv_block)
        first, stops, wants, *_, wanted = block_tables(rule, 0, self.length, draw.device)
        chunks = list(index_kernels._chunks(rule, 0, self.length, 1, tile=1, size=2))
        buffer = draw.normal(max(rows * _whole(stop) for _, _, rows, stop in chunks), dtype=torch.float16)
        groups = torch.empty(1, stops.numel(), wanted, dtype=torch.int32, device=draw.device)
        counts = torch.empty(1, stops.numel(), dtype=torch.int32, device=draw.device)

        def run(config: Config) -> Tensor:
            with mock.patch.object(select_kernels, "KEYS_PER_WARP", config["keys_per_warp"]):
                for _, block, rows, stop in chunks:
                    scores = buffer[: rows * _whole(stop)].view(1, rows, -1)
                    select_kernels.select_rows(
                        scores, stops, wants, groups, counts, first=first, block=block, most=stop, wanted=wanted
                    )
            return groups

        def result(config: Config) -> Tensor:
            groups.fill_(-7)
            return run(config).clone()

        return Work(run, _unequal, result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mass(Case):
    """attention_mass: the log-sum-exp of all queries, or the masses of the last ones."""

    op = "attention_mass"
    options = {"BM": (64, 128), "BN": (64, 128), "num_warps": (4, 8), "stages": (2, 3, 4)}  # noqa: RUF012
    kernel: str
    q_heads: int
    kv_heads: int
    dim: int
    queries: int

    @property
    def name(self) -> str:
        return f"{self.kernel} of {self.queries}, {self.q_heads}/{self.kv_heads} x {self.dim}"

    @property
    def key(self) -> str:
        return f"{self.op} {self.kernel} {_padded(self.dim, 64)}"

    def today(self) -> Config:
        tile = mass_kernels.TILES[self.kernel][_padded(self.dim, 64)]
        return {"BM": tile["BM"], "BN": tile["BN"], "num_warps": tile["num_warps"], "stages": tile["num_stages"]}

    def hopeless(self, config: Config, room: int) -> bool:
        bm, bn, warps, stages = config.values()
        kept, streamed = (bn, bm) if self.kernel == "mass" else (bm, bn)
        values = bm * bn * (2 if self.kernel == "mass" else 1)
        return 2 * _padded(self.dim, 64) * (kept + stages * streamed) > room or values > 32 * warps * 128

    def open(self, draw: Draw) -> Work:
        q, k = (
            draw.normal(1, self.queries, self.q_heads, self.dim),
            draw.normal(1, self.length, self.kv_heads, self.dim),
        )
        # of normal logits
        lse = (torch.arange(self.queries, device=draw.device) + (self.length - self.queries + 1.0)).log() + 0.5
        lse = lse[None, :, None].expand(1, -1, self.q_heads).contiguous()
        asked: dict[str, Any] = {
            "scale": self.dim**-0.5,
            "q_start": self.length - self.queries,
            "positions": None,
            "softcap": None,
            "sinks": None,
        }

        def run(config: Config) -> Tensor:
            tile = {("num_stages" if n == "stages" else n): v for n, v in config.items()}
            if self.kernel == "mass":
                tile["INNER"] = 0
            with mock.patch.object(mass_kernels, "_tile", return_value=tile):
                if self.kernel == "lse":
                    return mass_kernels.launch_lse(q, k, **asked)
                return mass_kernels.attention_mass_triton(q, k, lse, granularity=Granularity(), pool="sum", **asked)[0]

        return Work(run, self.error)

    def error(self, a: Tensor, b: Tensor) -> tuple[float, int]:
        """Error in units of 2**-10: of a log-sum-exp, or of a mass relative to itself."""
        worst, differing = 0.0, 0
        for x, y in zip(a.flatten(0, 2).split(256), b.flatten(0, 2).split(256), strict=True):
            gap = (x - y).abs()
            gap = gap if self.kernel == "lse" else torch.where(x == y, 0.0, gap / y.abs())
            worst, differing = max(worst, _largest(gap) * 2**10), differing + int((x != y).sum())
        return worst, differing


def _unequal(a: Tensor, b: Tensor) -> tuple[float, int]:
    differing = int((a != b).sum())
    return float(differing) * 2, differing


def _largest(x: Tensor) -> float:
    """The largest value; infinite where one is NaN."""
    return float(x.nan_to_num(nan=math.inf).max())


def _unit(q_block: int, kv_block: int) -> str:
    return f"shared {q_block} r{kv_block}" if q_block > 1 else f"per query r{kv_block}"


def _padded(dim: int, least: int) -> int:
    return max(triton.next_power_of_2(dim), least)


def _whole(stop: int) -> int:
    return triton.cdiv(stop, index_kernels.UNIT) * index_kernels.UNIT


# -- the list


def plan(small: bool) -> list[Case]:
    """What is swept, the most valuable first."""
    if small:
        few = {"length": 100, "budget": 60, "sink": 4, "window": 9, "most": 2}
        heads = {"q_heads": 4, "kv_heads": 1, "dim": 32}
        return [
            Attend(**few, **heads, q_block=32, kv_block=1),
            Attend(**few, **heads, q_block=1, kv_block=4),
            Scores(**few, dim=32, q_block=32, kv_block=1, reduce="max"),
            Scores(**few, dim=32, q_block=32, kv_block=1, reduce="max_prob"),
            Scores(**few, dim=32, q_block=1, kv_block=4, reduce=None),
            Select(**few, q_block=32, kv_block=1),
            Mass(**few, **heads, kernel="lse", queries=100),
            Mass(**few, **heads, kernel="mass", queries=70),
        ]

    def attend(q_heads: int, kv_heads: int, dim: int, most: int, *units: tuple[int, int]) -> Iterator[Case]:
        for q, r in units:
            yield Attend(length=64 * K, q_heads=q_heads, kv_heads=kv_heads, dim=dim, q_block=q, kv_block=r, most=most)

    def scores(dim: int, q: int, r: int, reduce: str | None, heads: int = 1, most: int = 8) -> Case:
        return Scores(length=64 * K, dim=dim, q_block=q, kv_block=r, reduce=reduce, heads=heads, most=most)

    def masses(*shape: int) -> Iterator[Case]:
        for kernel, n, queries in (("lse", 32 * K, 32 * K), ("mass", 64 * K, 2 * K)):
            q_heads, kv_heads, dim = shape
            yield Mass(length=n, kernel=kernel, q_heads=q_heads, kv_heads=kv_heads, dim=dim, queries=queries)

    shared, pooled, token = (32, 1), (1, 4), (1, 1)
    return [
        *attend(16, 4, 256, 14, shared, pooled),
        *attend(32, 8, 128, 16, shared, pooled),
        scores(128, *shared, "max"),
        scores(128, *pooled, None),
        Select(length=128 * K, q_block=1, kv_block=4),
        *attend(8, 2, 256, 8, shared, pooled),
        *attend(28, 4, 128, 8, shared, pooled),
        scores(64, *shared, "max"),
        scores(128, *shared, "max_prob"),
        scores(64, *shared, "max_prob"),
        scores(64, *pooled, None),
        *masses(16, 4, 256),
        *masses(32, 8, 128),
        Select(length=128 * K, q_block=32, kv_block=1),
        *attend(32, 8, 64, 10, shared, pooled),
        *attend(16, 4, 256, 6, token),
        *attend(32, 8, 128, 6, token),
        scores(128, *token, None, most=6),
        Select(length=128 * K, q_block=1, kv_block=1),
        scores(128, *shared, "max", heads=4, most=6),
        scores(128, *shared, "mean", most=6),
        *masses(32, 8, 64),
        *(Select(length=32 * K, q_block=q, kv_block=r) for q, r in (pooled, shared, token)),
        scores(64, *token, None, most=6),
        scores(64, *shared, "max", heads=4, most=6),
        scores(64, *shared, "mean", most=6),
        *attend(8, 2, 256, 4, token),
        *attend(28, 4, 128, 4, token),
        *attend(32, 8, 64, 4, token),
    ]
