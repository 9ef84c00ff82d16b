"""The checks that a GPU runs: they pass in the interpreter, and fail when a kernel is wrong."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def check(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("kernels/check.py")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="`make test-gpu` runs the checks at their full size")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
def test_a_wrong_page_is_found_and_nothing_else(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.index_topk

    def wrong_with_pages(*args: Any, **settings: Any) -> Any:
        support = real(*args, **settings)
        return support if "page_table" not in settings else replace(support, groups=support.groups.flip(2))

    monkeypatch.setattr(check, "index_topk", wrong_with_pages)

    ties, bits = check.near(1, 32, 1, torch.float16, "max")

    assert ties.passed
    assert "at most 0.00 places" in ties.result
    assert not bits.passed
    assert bits.result == "differ: pages of 16, pages of 24"


def test_a_gap_counts_places_of_float16(check: ModuleType) -> None:
    # scores 0 to 6 of what the last query may select beside itself: it takes 5 and 6, or misses 6
    iq, ik = torch.zeros(1, 8, 1, 1), torch.arange(8.0).view(1, 8, 1)
    iq[0, -1] = 1
    good = check.index_topk(iq.half(), ik.half(), budget=3, granularity=check.Granularity(), backend="reference")
    groups = good.groups.clone()
    groups[0, 0, -1, :2] = torch.tensor([3, 5], dtype=torch.int32)

    assert check.gap(iq, ik, good, "max") == 0
    # 6 was missed and 3 was taken, in places of 2^-10 of the largest score
    assert check.gap(iq, ik, replace(good, groups=groups), "max") == pytest.approx(3 / (6 * 2**-10))
