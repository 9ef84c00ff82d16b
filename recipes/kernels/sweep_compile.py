"""Compiles what a case of the sweep launches, in a process that needs no GPU."""

from typing import Any

import torch
from sweep_cases import Case, Config, Draw
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from topmass.ops.sparse_prefill import _triton as sparse_kernels
from topmass.ops.tile_union._triton import tile_union_triton

__all__ = ["compile_one", "only_compile", "reason"]


class Absent:
    """A driver that names a GPU for the compiler and launches nothing."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self.capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


COMPILED: list[Any] = []


def only_compile(capability: tuple[int, int]) -> None:
    """Make every launch of this process a compilation."""
    torch.set_num_threads(1)
    driver.set_active(Absent(capability))
    # the op's backends ask for tensors on a GPU
    sparse_kernels.tile_union = lambda support, *, tile, backend: tile_union_triton(support, tile=tile)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        COMPILED.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return COMPILED[-1]

    JITFunction.run = compile_only


def compile_one(case: Case, config: Config) -> dict[str, Any]:
    """Compile what the case launches, with tensors of the same shapes that nothing reads; returns what it needs, or why not."""
    COMPILED.clear()
    try:
        case.open(Draw("cpu", empty=True)).run(config)
    except Exception as error:
        return {"status": "does not compile", "reason": reason(error)}
    return {"shared_bytes": max(kernel.metadata.shared for kernel in COMPILED)}


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
