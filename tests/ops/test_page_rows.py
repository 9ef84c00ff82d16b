"""Rows land in their pages and nowhere else, whatever the strides."""

import pytest
import torch

from topmass.errors import ConfigError
from topmass.ops import _dispatch, page_rows
from topmass.ops._triton_common import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = _dispatch.available("page_rows") if ON_GPU or INTERPRETED else ("reference",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "columns", "width", "size"), [(2, 8, 12, 4), (1, 16, 16, 5), (3, 8, 7, 16), (4, 24, 96, 528)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_land_in_pieces_and_nothing_else_is_touched(heads, columns, width, size, dtype, backend):
    n, before = 37, 6
    whole = torch.full((9, size, heads, before + columns), -1.0, dtype=dtype, device=DEVICE)
    # as vLLM lays pages out: heads are strided, the columns are part of a wider row
    pages = whole.transpose(1, 2)[..., before:]
    slots = torch.randperm(8 * size, device=DEVICE)[:n] + size
    rows = torch.randn(len(slots), width + 3, dtype=dtype, device=DEVICE)[:, 2 : 2 + width]

    page_rows(pages, rows, slots, backend=backend)

    expected = torch.zeros(len(slots), heads * columns, dtype=dtype, device=DEVICE)
    expected[:, :width] = rows
    found = pages.transpose(1, 2)[slots // size, slots % size]
    assert torch.equal(found.flatten(1), expected)
    untouched = torch.ones(9 * size, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    assert pages.transpose(1, 2).flatten(0, 1)[untouched].eq(-1).all()
    assert whole[..., :before].eq(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_goes_to_slot_zero(backend):
    pages = torch.zeros(3, 2, 4, 8, device=DEVICE)
    slots = torch.tensor([9, -1, -1], dtype=torch.int64, device=DEVICE)
    page_rows(pages, torch.ones(3, 16, device=DEVICE), slots, backend=backend)
    assert pages[2, :, 1].eq(1).all()
    assert pages[0, :, 0].eq(1).all()
    assert pages.sum() == 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_write_nothing(backend):
    pages = torch.zeros(1, 1, 2, 4, device=DEVICE)
    page_rows(pages, torch.ones(0, 4, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), backend=backend)
    assert not pages.any()


def test_a_row_that_is_too_wide_is_refused():
    with pytest.raises(ConfigError, match=r"holds 2 x 4 values, got 9"):
        page_rows(torch.zeros(1, 2, 3, 4), torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64))
