"""Shared fixtures. Kernels run in the Triton interpreter where there is no GPU; no test may reach a hub."""

import os

# read when the libraries are imported, so set before torch is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores; a thread pool in each would only contend
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from unittest import mock

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


EMPTY, EMPTY_LIKE = _poisoned(torch.empty), _poisoned(torch.empty_like)


@pytest.fixture(autouse=True)
def poison_empty():
    """`torch.empty` and `torch.empty_like` return NaN, so that a kernel which leaves an output unwritten fails."""
    with mock.patch("torch.empty", EMPTY), mock.patch("torch.empty_like", EMPTY_LIKE):
        yield
