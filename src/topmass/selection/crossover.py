"""`dense_below="auto"`: the measured crossover of this device, from a table that an indexer brings along."""

from collections.abc import Mapping

import torch

from topmass.errors import ConfigError

__all__ = ["crossover_here", "device_key"]


def device_key(dtype: str = "bfloat16") -> str:
    """Name of this machine's device in a table of crossovers, such as `NVIDIA H100 80GB HBM3, bfloat16`."""
    return f"{torch.cuda.get_device_name()}, {dtype}" if torch.cuda.is_available() else "cpu"


def crossover_here(table: Mapping[str, int], *, dtype: str = "bfloat16") -> int:
    """Number of keys up to which dense attention is faster on this machine's device.

    Args:
        table: By the device and dtype of `device_key`.

    Raises:
        ConfigError: It was not measured on this device.
    """
    key = device_key(dtype)
    if key in table:
        return table[key]
    known = f"; it was on {', '.join(sorted(table))}" if table else ""
    raise ConfigError(
        f"dense_below='auto' needs a crossover measured on {key}{known}. Measure it with `topmass bench ttft` and store it with "
        "`topmass frontier --store-crossover DIR`, or give dense_below a number."
    )
