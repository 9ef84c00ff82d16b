"""Keys, values and index keys land in their places and nowhere else, whatever the strides."""

import pytest
import torch

from topmass.errors import ConfigError
from topmass.ops import _dispatch, write_pages
from topmass.ops._triton_common import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = _dispatch.available("write_pages") if ON_GPU or INTERPRETED else ("reference",)


def pool(pages, heads, size, dims, columns, dtype):
    """Rows and index rows of one layer in a memory of several."""
    rows = torch.full((pages, 2, heads, size, sum(dims) + 3), -1.0, dtype=dtype, device=DEVICE)
    return rows[:, 1, ..., 3:], torch.full((pages, size, columns), -1.0, dtype=dtype, device=DEVICE)


def tokens(n, heads, dim, dtype):
    """As a view of a wider product gives them."""
    return torch.randn(n, heads * dim + 5, dtype=dtype, device=DEVICE)[:, 5:].unflatten(1, (heads, dim))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "dims", "width", "columns", "size", "n"),
    [
        (2, (8, 8), 12, 16, 4, 29),
        (1, (16, 8), 16, 16, 5, 1),
        (3, (8, 12), 7, 24, 16, 100),
        (4, (32, 32), 64, 96, 528, 37),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_land_in_their_slots_and_nothing_else_is_touched(heads, dims, width, columns, size, n, dtype, backend):
    rows, index_rows = pool(9, heads, size, dims, columns, dtype)
    n = min(n, 8 * size)
    slots = torch.randperm(8 * size, device=DEVICE)[:n] + size
    key, value = (tokens(n, heads, dim, dtype) for dim in dims)
    index = tokens(n, 1, width, dtype)[:, 0]

    write_pages(rows, key, value, slots, index_rows=index_rows, index=index, backend=backend)

    found = rows.transpose(1, 2)[slots // size, slots % size]
    assert torch.equal(found, torch.cat([key, value], -1))
    found = index_rows[slots // size, slots % size]
    assert torch.equal(found[:, :width], index)
    assert found[:, width:].eq(0).all()
    untouched = torch.ones(9 * size, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    for memory in (rows.transpose(1, 2), index_rows):
        assert memory.flatten(0, 1)[untouched].eq(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens_of_a_prompt(backend):
    n, size = 530, 64
    rows, index_rows = pool(10, 2, size, (8, 8), 16, torch.float32)
    key, value, index = tokens(n, 2, 8, torch.float32), tokens(n, 2, 8, torch.float32), tokens(n, 1, 16, torch.float32)
    slots = torch.arange(n, device=DEVICE) + size
    write_pages(rows, key, value, slots, index_rows=index_rows, index=index[:, 0], backend=backend)
    assert torch.equal(rows.transpose(1, 2).flatten(0, 1)[slots], torch.cat([key, value], -1))
    assert torch.equal(index_rows.flatten(0, 1)[slots], index[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_without_index_keys_writes_none(backend):
    rows, _ = pool(3, 2, 4, (8, 8), 8, torch.float32)
    key, value = tokens(2, 2, 8, torch.float32), tokens(2, 2, 8, torch.float32)
    write_pages(rows, key, value, torch.tensor([9, 4], device=DEVICE), backend=backend)
    assert torch.equal(rows[2, :, 1], torch.cat([key, value], -1)[0])
    assert rows.ne(-1).sum() == 2 * 2 * 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_goes_to_slot_zero(backend):
    rows, index_rows = pool(3, 2, 4, (8, 8), 8, torch.float32)
    ones = torch.ones(3, 2, 8, device=DEVICE)
    slots = torch.tensor([9, -1, -1], dtype=torch.int64, device=DEVICE)
    write_pages(rows, ones, ones, slots, index_rows=index_rows, index=ones[:, 0], backend=backend)
    assert rows[2, :, 1].eq(1).all()
    assert rows[0, :, 0].eq(1).all()
    assert rows.eq(1).sum() == 2 * 2 * 16
    assert index_rows.eq(1).sum() == 2 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_write_nothing(backend):
    rows, _ = pool(1, 1, 2, (4, 4), 8, torch.float32)
    none = torch.ones(0, 1, 4, device=DEVICE)
    write_pages(rows, none, none, torch.zeros(0, dtype=torch.int64, device=DEVICE), backend=backend)
    assert rows.eq(-1).all()


def test_what_does_not_fit_is_refused():
    rows, key, slots = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="a key of 4 and a value of 5"):
        write_pages(rows, key, torch.zeros(1, 2, 5), slots)
    with pytest.raises(ConfigError, match="give both or neither"):
        write_pages(rows, key, key, slots, index=torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="of 4 values at most, got 5"):
        write_pages(rows, key, key, slots, index_rows=torch.zeros(1, 3, 4), index=torch.zeros(1, 5))
