"""Every kernel once on a small odd shape, beside its reference: what the sanitizer watches.

python tests/gpu/small_kernels.py sparse_prefill tile_union
"""

import sys
from collections.abc import Callable

import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.ops import (
    attention_mass,
    dense_lse,
    index_topk,
    index_vectors,
    kl_rows,
    pooled_mass,
    sparse_prefill,
    tile_union,
    topk_support,
    write_pages,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# neither is a multiple of a block
N, START = 101, 13
PER_QUERY, SHARED = Granularity(kv_block=4), Granularity(q_block=32)


def draw(*size: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same everywhere."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(heads: int = 6, kv_heads: int = 2, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of positions `START ...`, keys and values of all."""
    return draw(2, N - START, heads, dim), draw(2, N, kv_heads, dim, seed=1), draw(2, N, kv_heads, dim, seed=2)


def support_of(unit: Granularity, backend: str) -> Support:
    """A selection of integers, which no order of summation changes."""
    iq, ik = (
        draw(2, n, *more, seed=s).mul(2).round()
        for n, more, s in ((N - START, (1, 16), 3), (N // unit.kv_block, (16,), 4))
    )
    return index_topk(iq, ik, budget=48, granularity=unit, sink=3, window=5, q_start=START, backend=backend)


def index() -> None:
    """Scores and their selection, per query over groups and shared."""
    for unit in (PER_QUERY, SHARED):
        mine, plain = (support_of(unit, backend) for backend in ("triton", "reference"))
        assert torch.equal(mine.groups, plain.groups)
        assert torch.equal(mine.counts, plain.counts)


def select() -> None:
    """Selection of rows that fit the registers and of longer ones."""
    for dtype in (torch.float16, torch.float32):
        scores = draw(1, 1, 3, 2600, dtype=dtype).mul(4).round()
        rule = SupportRule(budget=Budget(tokens=700), sink=3, window=5)
        mine, plain = (
            topk_support(scores, rule=rule, q_start=2597, q_len=3, backend=b) for b in ("triton", "reference")
        )
        assert torch.equal(mine.groups, plain.groups)


def union() -> None:
    """Lists of the keys that a tile of queries selects."""
    support = support_of(PER_QUERY, "reference")
    mine, plain = (tile_union(support, tile=32, backend=b) for b in ("triton", "reference"))
    assert torch.equal(mine.counts, plain.counts)


def attend() -> None:
    """Sparse attention over a union and over a shared list, the keys in pages too."""
    q, k, v = layer()
    for unit in (PER_QUERY, SHARED):
        support = support_of(unit, "reference")
        mine, plain = (sparse_prefill(q, k, v, support, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(mine, plain, rtol=2e-2, atol=2e-2)
        table = torch.arange(2 * -(-N // 16), device=DEVICE, dtype=torch.int32).flip(0).view(2, -1)
        pools = [x.new_zeros(table.numel(), 16, *x.shape[2:]) for x in (k, v)]
        for pool, x in zip(pools, (k, v), strict=True):
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -N % 16))
            pool[table.long()] = padded.unflatten(1, (-1, 16))
        paged = sparse_prefill(q, *pools, support, page_table=table, backend="triton")
        assert torch.equal(paged[0], mine[0])


def mass() -> None:
    """Attention mass, whole and pooled, and the normaliser."""
    q, k, v = layer()
    kw = {"scale": 0.2, "q_start": START}
    mine, plain = (attention_mass(q, k, backend=b, **kw) for b in ("triton", "reference"))
    torch.testing.assert_close(mine.double(), plain.double(), rtol=1e-2, atol=1e-4)
    mine, plain = (pooled_mass(q, k, granularity=PER_QUERY, backend=b, **kw)[0] for b in ("triton", "reference"))
    torch.testing.assert_close(mine.double(), plain.double(), rtol=1e-2, atol=1e-4)
    lse = dense_lse(q, k, v, scale=0.2)[1]
    assert torch.isfinite(lse).all()


def loss() -> None:
    """The KL of score rows and its gradient."""
    scores, stop = draw(1, 3, 201, dtype=torch.float32), torch.tensor([0, 97, 201])
    mine, plain = (
        kl_rows(scores.abs().clone(), scores, first=2, stop=stop, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def vectors() -> None:
    """Index keys of groups, and queries of heads, which are rows of a wider memory."""
    wide, weight = draw(2, 4 * N, 3 * 32 + 8)[..., 8:], draw(32)
    for raw in (wide[..., :32].unflatten(1, (N, 4))[:, :, :, None], wide.unflatten(-1, (1, 3, 32))):
        table = draw(1, raw.shape[1], 16)
        settings = {"eps": 1e-6, "cos": table, "sin": table}
        mine, plain = (index_vectors(raw, weight, **settings, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(mine, plain, rtol=2e-3, atol=1e-3)


def write() -> None:
    """Tokens in pages, rows of which are narrower than a block of the kernel; few and many of them."""
    for n in (N, 601):
        pages = n // 12 + 1
        slots = torch.randperm(pages * 12, generator=torch.Generator().manual_seed(5))[:n].to(DEVICE)
        key, value, index = draw(n, 3, 20), draw(n, 3, 20), draw(n, 40)
        memory = [
            [torch.zeros(pages, *shape, device=DEVICE, dtype=key.dtype) for shape in ((3, 12, 48), (12, 56))]
            for _ in range(2)
        ]
        for (rows, index_rows), backend in zip(memory, ("triton", "reference"), strict=True):
            write_pages(rows[..., 8:], key, value, slots, index_rows=index_rows, index=index, backend=backend)
        assert all(map(torch.equal, *memory))


KERNELS: dict[str, Callable[[], None]] = {
    "index_topk": index,
    "topk_support": select,
    "tile_union": union,
    "sparse_prefill": attend,
    "attention_mass": mass,
    "indexer_kl": loss,
    "index_vectors": vectors,
    "write_pages": write,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or KERNELS:
        KERNELS[name]()
        print(name, "ok", flush=True)  # noqa: T201
