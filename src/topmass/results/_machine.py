"""Facts about this machine and this code that a manifest records."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["command_line", "git_commit", "machine", "versions"]

_PACKAGES = ("torch", "transformers", "numpy", "triton", "vllm")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; absent ones are left out."""
    # the parent package is loaded, but importing it by name would tie this layer to what it exports
    found = {"python": platform.python_version(), "topmass": sys.modules["topmass"].__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Processor, cores available to this process and operating system; no host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": _processor(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, `+` when it has changes, `None` outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The command that started this process, as one would type it."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py" and program.parent.name in ("cli", "topmass")
    name = "topmass" if module or program.name == "topmass" else f"python {program.name}"
    return shlex.join([*name.split(), *sys.argv[1:]])
