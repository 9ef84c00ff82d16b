"""`topmass doctor`."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from topmass.cli._common import emit, print_table
from topmass.errors import BackendUnavailableError
from topmass.results import machine_facts

__all__ = ["doctor"]

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "vllm", "scipy", "pyarrow", "altair",
    "vl-convert-python", "jinja2",
)  # fmt: skip


def doctor(*, json: bool = False, config: Path | None = None) -> None:
    """Versions, devices, and each kernel backend with its reason when it cannot run.

    Args:
        json: Print as JSON.
        config: Recipe (TOML); nothing in it concerns this command.
    """
    found = {"versions": _versions(), "machine": machine_facts(), "devices": _devices(), "backends": _backends()}
    if json:
        emit(found)
        return
    print_table("versions", ["package", "version"], [[k, v or "not installed"] for k, v in found["versions"].items()])
    print_table("devices", ["device", "what"], [[d["name"], d["what"]] for d in found["devices"]])
    rows = [[b["op"], b["backend"], b["device"], b["why_not"] or "runs"] for b in found["backends"]]
    print_table("kernel backends", ["op", "backend", "device", "state"], rows)


def _versions() -> dict[str, str | None]:
    import topmass

    found: dict[str, str | None] = {"topmass": topmass.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _devices() -> list[dict[str, str]]:
    import torch

    facts = machine_facts()
    devices = [{"name": "cpu", "what": f"{facts['processor']}, {facts['cores']} cores"}]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}"
        devices.append({"name": f"cuda:{i}", "what": what})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "what": "Apple GPU"})
    return devices


def _backends() -> list[dict[str, str | None]]:
    """Run every backend of every op once on a small input."""
    import topmass.ops  # noqa: F401 -- registers the backends
    from topmass.ops import _dispatch

    devices = [device["name"] for device in _devices()]
    return [
        {"op": op, "backend": name, "device": device, "why_not": _why_not(op, name, device)}
        for op in _dispatch.ops()
        for name in _dispatch.available(op)
        for device in devices
    ]


def _why_not(op: str, backend: str, device: str) -> str | None:
    try:
        _try(op, backend, device)
    except BackendUnavailableError as error:
        return str(error).partition(" can run this call: ")[2] or str(error)
    except Exception as error:  # a backend that fails in any way is what this command is for
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _try(op: str, backend: str, device: str) -> Any:
    import torch

    from topmass import Budget, Granularity, SupportRule, ops, selection

    # fused kernels take half precision only
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    q, k = (torch.ones(1, 64, heads, 64, device=device, dtype=dtype) for heads in (4, 2))
    if op == "dense_lse":
        return ops.dense_lse(q, k, k, scale=0.1, backend=backend)
    if op == "indexer_kl":
        mass = torch.rand(1, 64, 64, device=device)
        return ops.kl_rows(mass, mass * 2, first=0, stop=torch.arange(64) + 1, backend=backend)
    if op == "attention_mass":
        return ops.attention_mass(q, k, torch.full((1, 64, 4), 5.0, device=device), scale=0.1, backend=backend)
    if op == "topk_support":
        mass = torch.rand(1, 1, 64, 64, device=device).tril()
        rule = SupportRule(budget=Budget(tokens=16))
        return ops.topk_support(mass, rule=rule, q_start=0, q_len=64, backend=backend)
    if op == "sparse_prefill":
        support = selection.OracleSelector(budget=16).select(selection.AttentionInputs(q=q, k=k))
        return ops.sparse_prefill(q, k, k, support, backend=backend)
    if op == "tile_union":
        support = selection.OracleSelector(budget=16).select(selection.AttentionInputs(q=q, k=k))
        return ops.tile_union(support, backend=backend)
    if op == "index_topk":
        return ops.index_topk(q[:, :, :1], k[:, :, 0], budget=16, granularity=Granularity(), backend=backend)
    if op == "index_vectors":
        return ops.index_vectors(k[:, :, None], torch.ones_like(k[0, 0, 0]), eps=1e-6, backend=backend)
    if op == "write_pages":
        pages = torch.zeros(16, k.shape[2], 4, 2 * k.shape[3], device=device, dtype=dtype)
        ops.write_pages(pages, k[0], k[0], torch.arange(64, device=device), backend=backend)
        return pages
    raise AssertionError(f"doctor has no input for {op}")
