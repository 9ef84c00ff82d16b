"""Kernels against plain PyTorch in float64, and plain PyTorch against the formula."""

import pytest
import torch

from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import _dispatch, index_vectors
from topmass.ops._triton_common import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = _dispatch.available("index_vectors") if ON_GPU or INTERPRETED else ("reference",)
EPS = 1e-6


def draw(batch, groups, members, heads, dim, rotary, dtype):
    """Raw rows in a wider memory, and tables of which every `members`-th row counts."""
    g = torch.Generator().manual_seed(groups + dim)
    wide = torch.randn(batch, groups * members, heads * dim + 8, generator=g).to(DEVICE, dtype)
    raw = wide[..., 8:].unflatten(1, (groups, members)).unflatten(-1, (heads, dim))
    angle = torch.randn(1, groups * members, rotary // 2, generator=g).to(DEVICE)
    angle = torch.cat([angle, angle], -1)
    cos, sin = (x.to(dtype)[:, ::members] for x in (angle.cos(), angle.sin()))
    weight = torch.randn(dim, generator=g).to(DEVICE)
    return raw, weight, *((cos, sin) if rotary else (None, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [(1, 70, 1, 1, 64, 64), (2, 33, 4, 1, 32, 16), (1, 5, 1, 3, 24, 12), (2, 9, 2, 2, 16, 0), (1, 300, 4, 1, 128, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_norm_and_rope(shape, dtype, backend):
    raw, weight, cos, sin = draw(*shape, dtype)
    found = index_vectors(raw, weight, eps=EPS, cos=cos, sin=sin, backend=backend)
    assert found.dtype == dtype
    # the interpreter cuts off what it should round
    rtol = 2e-6 if dtype == torch.float32 else 8e-3 if INTERPRETED else 4e-3
    x = raw.double().mean(2)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    if rotary := shape[-1]:
        low, high, rest = x.split([rotary // 2, rotary // 2, x.shape[-1] - rotary], -1)
        c, s = (t.double()[:, :, None, : rotary // 2] for t in (cos, sin))
        x = torch.cat([low * c - high * s, high * c + low * s, rest], -1)
    torch.testing.assert_close(found.double(), x, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_groups_give_nothing(backend):
    raw, weight, cos, sin = draw(1, 1, 4, 1, 16, 8, torch.float32)
    found = index_vectors(raw[:, :0], weight, eps=EPS, cos=cos[:, :0], sin=sin[:, :0], backend=backend)
    assert found.shape == (1, 0, 1, 16)


def test_one_table_alone_is_refused():
    raw, weight, cos, _ = draw(1, 3, 1, 1, 16, 8, torch.float32)
    with pytest.raises(ConfigError, match="give both or neither"):
        index_vectors(raw, weight, eps=EPS, cos=cos)


def test_tables_that_do_not_fit_are_refused():
    raw, weight, cos, sin = draw(1, 3, 1, 1, 16, 8, torch.float32)
    for change in (lambda x: x[..., :7], lambda x: torch.cat([x, x, x], -1)):
        with pytest.raises(ConfigError, match="as many rows and an even width"):
            index_vectors(raw, weight, eps=EPS, cos=change(cos), sin=change(sin))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or Triton's interpreter")
def test_the_kernel_refuses_what_needs_a_gradient():
    raw, weight, cos, sin = draw(1, 3, 1, 1, 16, 8, torch.float32)
    with pytest.raises(BackendUnavailableError, match="has no gradient"):
        index_vectors(raw, weight.requires_grad_(), eps=EPS, cos=cos, sin=sin, backend="triton")
    assert index_vectors(raw, weight, eps=EPS, cos=cos, sin=sin).requires_grad
