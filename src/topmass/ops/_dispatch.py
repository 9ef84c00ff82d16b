"""Kernel backends of an op: registration, choice, and the reason for each refusal."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from topmass.errors import BackendUnavailableError

__all__ = ["KernelBackend", "available", "known", "known_or_auto", "ops", "record", "register", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBackend:
    """One implementation of one op.

    Attributes:
        name: What users pass as `backend=`.
        fn: The implementation; same signature as the reference of the op.
        why_not: Returns `None` if the call can run, else the reason in one sentence.
        priority: Higher is tried first under `backend="auto"`.
    """

    name: str
    fn: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None
    priority: int = 0


_BACKENDS: dict[str, dict[str, KernelBackend]] = {}
_CHOSEN: ContextVar[dict[str, str] | None] = ContextVar("chosen", default=None)


def register(op: str, backend: KernelBackend) -> None:
    """Add `backend` to `op`; registering a name twice is an error."""
    table = _BACKENDS.setdefault(op, {})
    if backend.name in table:
        raise ValueError(f"Kernel backend {backend.name!r} of op {op!r} is already registered.")
    # in the order in which `auto` tries them
    _BACKENDS[op] = dict(sorted([*table.items(), (backend.name, backend)], key=lambda item: -item[1].priority))


def ops() -> tuple[str, ...]:
    """Names of the ops that have backends."""
    return tuple(_BACKENDS)


def available(op: str) -> tuple[str, ...]:
    """Names of the backends of `op`, in the order `"auto"` tries them."""
    return tuple(_BACKENDS[op])


def known(op: str, name: str) -> KernelBackend:
    """The backend of that name.

    Raises:
        BackendUnavailableError: There is none.
    """
    if name not in _BACKENDS[op]:
        absent = name in ("triton", "masked") and importlib.util.find_spec("triton") is None
        why = "; the package triton is not installed" if absent else ""
        raise BackendUnavailableError(f"Unknown backend {name!r} of {op!r}; known: {', '.join(available(op))}{why}.")
    return _BACKENDS[op][name]


def known_or_auto(op: str, name: str) -> str:
    """`name` if `op` has a backend of that name, else `"auto"`: for a name that is given to several ops at once."""
    return name if name in _BACKENDS[op] else "auto"


@contextmanager
def record() -> Iterator[dict[str, str]]:
    """Collect what `resolve` chooses inside the block, by op; several backends of one op are joined by `+`."""
    chosen: dict[str, str] = {}
    token = _CHOSEN.set(chosen)
    try:
        yield chosen
    finally:
        _CHOSEN.reset(token)


def resolve(op: str, name: str, /, *args: Any, **kwargs: Any) -> KernelBackend:
    """Return the backend that will run this call.

    An explicit name never falls back: a silent slow path would be timed as if it were the fast one.

    Raises:
        BackendUnavailableError: `name` cannot run the call, or `"auto"` found no backend that can.
    """
    reasons = []
    for candidate in available(op) if name == "auto" else (name,):
        backend = known(op, candidate)
        reason = backend.why_not(*args, **kwargs)
        if reason is None:
            # torch.compile cannot trace a context variable
            if not torch.compiler.is_compiling():
                _note(op, candidate)
            return backend
        reasons.append(f"{candidate} {reason}")
    raise BackendUnavailableError(f"No backend of {op!r} can run this call: {' '.join(reasons)}")


def _note(op: str, name: str) -> None:
    if (chosen := _CHOSEN.get()) is not None and name not in (before := chosen.get(op, "")).split("+"):
        chosen[op] = f"{before}+{name}" if before else name
