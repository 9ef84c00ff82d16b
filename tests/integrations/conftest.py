"""Models run on the reference ops: Triton's interpreter would only be slow here."""

import pytest

from topmass.ops import _dispatch


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch):
    monkeypatch.setattr(_dispatch, "available", lambda op: ("reference",))
