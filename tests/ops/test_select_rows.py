"""The selection kernel called as index_topk calls it: rows of several lengths, out of a chunk, ties, NaN and signs of zero."""

import pytest
import torch
from torch import Tensor

from topmass.ops._triton_common import INTERPRETED

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no triton backend can run here", allow_module_level=True)
pytest.importorskip("triton")

from topmass.ops.topk_support._triton import select_rows

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def expected(scores: Tensor, stops: Tensor, wants: Tensor, *, first: int, slots: int) -> Tensor:
    """By a stable sort: ties to the lower id, -0 is 0, NaN ranks by its bits."""
    bits = scores.view(DTYPES[scores.dtype]).long()
    top = 2 ** (8 * scores.itemsize - 1) - 1
    key = torch.where(bits < 0, -(bits & top), bits)
    place = torch.arange(scores.shape[-1], device=scores.device)
    key = key.masked_fill(~((place >= first) & (place < stops[:, None].long())), -(2**40))
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :slots]
    live = torch.arange(slots, device=scores.device) < wants[:, None]
    ids = order.masked_fill(~live, 2**40).sort(-1).values
    return ids.masked_fill(ids == 2**40, -1).int()


def check(scores: Tensor, stops: list[int], want: int, *, first: int, block: int = 0) -> None:
    """Select from rows that begin at a block, and compare."""
    ends = torch.tensor(stops, dtype=torch.int32, device=DEVICE)
    wants = (ends - first).clamp(0, want)
    groups = torch.full((scores.shape[0], len(stops), want), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.full(groups.shape[:2], -7, dtype=torch.int32, device=DEVICE)

    select_rows(scores, ends, wants, groups, counts, first=first, block=block, most=stops[-1], wanted=want)

    right = expected(scores, ends[block:], wants[block:], first=first, slots=want)
    assert torch.equal(groups[:, block:], right)
    assert torch.equal(counts[:, block:], wants[block:].expand_as(counts[:, block:]))
    # blocks of other chunks are left alone
    assert (groups[:, :block] == -7).all()


def draw(kind: str, *size: int) -> Tensor:
    x = torch.randn(*size, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    if kind == "integers":
        return (2 * x).round()
    if kind == "negative":
        return -x.abs() - 1
    y = torch.where(x > 2, torch.inf, torch.where(x < -1, -torch.inf, x))
    y = torch.where((x > 0) & (x < 0.2), torch.nan, y)
    return torch.where((x > 0.5) & (x < 1), -0.0, y)


@pytest.mark.parametrize("kind", ["integers", "negative", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "first"), [(2112, 37), (2101, 0)])
def test_rows_of_several_lengths(kind: str, dtype: torch.dtype, width: int, first: int) -> None:
    # all taken, short, long by one, and cut inside and at the end of 32 scores; 2101: rows that begin anywhere
    stops = [40, 600, 1900, 2049 + first, 2080, 2095, 2100, 2101]
    check(draw(kind, 1, 6, width).to(dtype), stops, 600, first=first, block=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_longer_than_a_block(dtype: torch.dtype) -> None:
    check(draw("integers", 1, 1, 40_064).to(dtype), [40_001], 600, first=37)


def test_programs_take_several_rows_after_each_other() -> None:
    # long, short and long again: nothing of the row before is taken for this one's
    scores = draw("integers", 5, 4, 2112).half()
    check(scores, [50, 1500, 2100, 2112], 600, first=3)
