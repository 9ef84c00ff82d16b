"""Create the project's virtual environment and install what a make target needs.

    python3 scripts/bootstrap.py demo    # topmass with its `eval` extra
    python3 scripts/bootstrap.py test    # the same, the tests, the linters and Triton, for its interpreter

Nothing but the standard library, and no syntax newer than Python 3.6: an old interpreter must live to print its remedy.

Environment variables:
    TOPMASS_TORCH: requirement for torch, taken as it is from pip's own index; default: torch==2.13.0, the CPU build
        where there is no NVIDIA GPU.
    TOPMASS_EXTRAS: extras of topmass to install; default: eval for the demo, eval,triton for the tests (Triton is for
        Linux only and takes about 1 GB unpacked).
    TOPMASS_VENV: where the environment lives; default: .venv.
"""
# ruff: noqa: T201

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.14")
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GROUPS = {"demo": (), "test": ("test", "lint")}
EXTRAS = {"demo": "eval", "test": "eval,triton"}
VERSION = "{}.{}".format(*sys.version_info)


def say(text):
    """Print one line of progress."""
    print(f"setup: {text}", flush=True)


def fail(text):
    """End with one line that names the remedy."""
    sys.exit(f"setup: error: {text}")


def run(*command, show_errors=True):
    """Run a command in the project root and return whether it succeeded."""
    stderr = None if show_errors else subprocess.DEVNULL
    return subprocess.run(command, cwd=str(ROOT), stderr=stderr).returncode == 0


def require_python():
    """Go on under a Python that can do the set-up, or end with the remedy."""
    if sys.version_info < OLDEST_PYTHON:
        newer = next(filter(None, map(shutil.which, NEWER_PYTHONS)), None)
        if newer is None:
            fail(
                f"Python 3.11 or newer is needed, this is {VERSION}; install one, or name it: make PYTHON=/path/to/python3"
            )
        os.execv(newer, [newer, *sys.argv])
    # Debian and Ubuntu ship venv without ensurepip, in a package of its own
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        fail(f"{sys.executable} has no venv module; on Debian or Ubuntu: apt-get install python{VERSION}-venv")


def has_nvidia_gpu():
    """Return whether nvidia-smi runs and lists a device."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout


def install_torch(pip):
    """Install torch: the CPU build where there is no GPU and an index that can be reached has one."""
    wanted = os.environ.get("TOPMASS_TORCH", "")
    if wanted:
        say(f"installing {wanted}, as TOPMASS_TORCH says")
    elif sys.platform != "linux" or has_nvidia_gpu():
        wanted = TORCH
        say(f"installing {wanted}, the default build for this machine")
    else:
        wanted = TORCH
        say(f"no NVIDIA GPU found: installing the CPU build of {wanted} (about 200 MB)")
        # --no-deps: that index need not have the rest, the next install adds it from pip's own
        options = ("--no-deps", "--timeout=15", "--retries=0", "--index-url", CPU_INDEX)
        if run(*pip, "install", *options, wanted, show_errors=False):
            return
        say(f"{CPU_INDEX} did not serve it: taking {wanted} from pip's own index (larger if that has a CUDA build)")
    if not run(*pip, "install", wanted):
        fail(f"pip could not install {wanted}, for the reason above; to choose another: make TOPMASS_TORCH='torch==X'")


def install(target, venv, key):
    """Bring the environment to what `target` needs and record that in its stamp.

    The stamp's first line is `key`, its other lines are the targets already served. It is written before anything is
    installed, so that an interrupted set-up goes on where it stopped and an environment of somebody else is left alone.
    """
    python, stamp = venv / "bin" / "python", venv / ".topmass-setup"
    if venv.exists() and not stamp.exists():
        fail(
            f"{venv} exists and was not made by this script; remove it, or choose another place: make TOPMASS_VENV=..."
        )
    recorded = stamp.read_text().split() if stamp.exists() else []
    fresh = recorded[:1] != [key] or not python.exists()
    # what the tests need includes what the demo needs
    if not fresh and {target, "test"} & set(recorded):
        return

    started = time.monotonic()
    if fresh:
        say(f"creating {venv} with Python {VERSION} (once, a few minutes, most of it downloads)")
        if not run(sys.executable, "-m", "venv", "--clear", str(venv)):
            fail(f"could not create {venv}, for the reason above; is the folder writable, and is there space?")
        stamp.write_text(f"{key}\n")
    pip = [str(python), "-m", "pip"] + ([] if sys.stdout.isatty() else ["-qq"])
    # --group came with pip 25.1
    if not run(*pip, "install", "--upgrade", "pip>=25.1"):
        fail(
            "pip found no package index, for the reason above; behind a proxy or mirror set https_proxy or PIP_INDEX_URL"
        )
    install_torch(pip)
    extras = os.environ.get("TOPMASS_EXTRAS") or EXTRAS[target]
    say(" and the group ".join([f"installing topmass[{extras}]", *GROUPS[target]]))
    groups = [argument for group in GROUPS[target] for argument in ("--group", group)]
    if not run(*pip, "install", "--editable", f".[{extras}]", *groups):
        fail("pip could not install what topmass needs, for the reason above; the same command goes on from here")
    with stamp.open("a") as lines:
        lines.write(f"{target}\n")
    say(f"ready after {time.monotonic() - started:.0f} s")


def main():
    """Set up the target named on the command line, if that is not done yet."""
    target = sys.argv[1] if len(sys.argv) == 2 else None
    if target not in GROUPS:
        fail("usage: bootstrap.py demo|test")
    require_python()
    venv = ROOT / os.environ.get("TOPMASS_VENV", ".venv")
    # the path too: after a move the scripts in bin/ would still name the old place
    settings = [VERSION, str(venv), os.environ.get("TOPMASS_TORCH", ""), os.environ.get("TOPMASS_EXTRAS", "")]
    parts = [*map(os.fsencode, settings), (ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes()]
    install(target, venv, hashlib.sha256(b"\0".join(parts)).hexdigest())


if __name__ == "__main__":
    main()
