"""Where training stands, in one file that is there as a whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from topmass.errors import RunError

__all__ = ["load_checkpoint", "remove_checkpoint", "save_checkpoint"]

NAME = "checkpoint.pt"
VERSION = 1


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `directory`.

    Raises:
        RunError: It cannot be written; the one before stays.
    """
    temporary = directory / f"{NAME}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / NAME)
    except OSError as error:
        raise RunError(
            f"Cannot write the checkpoint in {directory}: {error.strerror or error}. Make room there; the run resumes."
        ) from error


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The checkpoint in `directory`, on the CPU; `None` if there is none.

    Raises:
        RunError: It is damaged or of another version.
    """
    path = directory / NAME
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"{path} cannot be read ({reason}); delete {directory} and start again.") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise RunError(f"{path} is of another version of topmass; finish the run with that one, or delete {directory}.")
    return {k: v for k, v in state.items() if k != "version"}


def remove_checkpoint(directory: Path) -> None:
    """Delete the checkpoint of a run that is complete."""
    (directory / NAME).unlink(missing_ok=True)
