"""What the recipes add to vLLM's worker processes (`worker_extension_cls`): fixed tuning on a GPU, and what ran there."""

import contextlib
import importlib
import pkgutil
from typing import Any

import torch

from topmass.integrations.vllm import register

__all__ = ["Watched"]


class Watched:
    """Methods that `collective_rpc` asks for by name."""

    vllm_config: Any

    def topmass_ran(self) -> dict[str, Any]:
        """Kernel backends with their calls, what chose the keys, and the totals as a sentence; nothing without an indexer."""
        from topmass.integrations.vllm import versions

        service = versions.service_of(self.vllm_config)
        if service is None:
            return {}
        found = service.receipts
        return {"backends": found.backends, "selection": found.selection, "total": str(found.total)}


def fix_tuning() -> None:
    """Take the first configuration of each of vLLM's gated delta kernels.

    Trying all of them compiles some 90 kernels, two minutes of an engine's start; and another choice rounds otherwise.
    """
    from triton.runtime import Autotuner

    for place in ("vllm.third_party.flash_linear_attention.ops", "vllm.model_executor.layers.fla.ops"):
        with contextlib.suppress(ModuleNotFoundError):
            package = importlib.import_module(place)
            for found in pkgutil.iter_modules(package.__path__, f"{place}."):
                for kernel in vars(importlib.import_module(found.name)).values():
                    # heuristics are around it
                    while kernel is not None and not isinstance(kernel, Autotuner):
                        kernel = vars(kernel).get("fn") if type(kernel).__module__.startswith("triton.") else None
                    if kernel is not None:
                        kernel.configs = kernel.configs[:1]


# a worker imports this before it builds a model; where the source tree is not installed, nobody finds the plugin's entry point
register()
if torch.cuda.is_available():
    fix_tuning()
