"""What describes a run: `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from topmass.errors import RunError
from topmass.results import _machine
from topmass.results.schema import SCHEMA_VERSION, SCHEMAS, schema_of

__all__ = ["ATTEMPT", "MANIFEST", "difference", "make_manifest", "now", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"

# what must not change between the parts of one run; everything else is noted in `attempts`
_IDENTITY = ("schema_version", "kind", "config", "seeds", "model", "weights_hash", "key")
ATTEMPT = ("started", "versions", "git_commit", "device", "machine", "command")


def make_manifest(
    kind: str,
    config: Mapping[str, Any],
    *,
    model: str,
    weights_hash: str | None = None,
    seeds: Mapping[str, int] | None = None,
    device: str = "cpu",
    command: str | None = None,
) -> dict[str, Any]:
    """Describe a run that is about to start.

    Args:
        kind: `"eval"`, `"audit"`, `"distill"`, `"bench"`, `"ttft"` or `"serve"`.
        config: The full resolved configuration; must be JSON.
        model: Name or path of the model.
        weights_hash: Hash of its weights.
        seeds: Every seed, by what it seeds.
        device: Device, in words.
        command: How to repeat it; `None` takes the command line of this process.
    """
    schema_of(kind)
    started = now()
    digest = hashlib.sha256(json.dumps([kind, config, started], sort_keys=True).encode()).hexdigest()[:6]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"{kind}-{started[:19].replace('-', '').replace(':', '')}-{digest}",
        "kind": kind,
        "model": model,
        "weights_hash": weights_hash,
        "config": json.loads(json.dumps(config)),
        "seeds": dict(seeds or {}),
        "device": device,
        "machine": _machine.machine(),
        "versions": _machine.versions(),
        "git_commit": _machine.git_commit(),
        "command": command or _machine.command_line(),
        "started": started,
        "finished": None,
    }


def now() -> str:
    """This moment, as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say what differs, empty if nothing does."""
    a, b = ({name: m.get(name) for name in _IDENTITY} for m in (stored, asked))
    a, b = (_flatten(json.loads(json.dumps(m))) for m in (a, b))
    a["topmass"], b["topmass"] = (m.get("versions", {}).get("topmass", "unknown") for m in (stored, asked))
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    shown = [f"{name.removeprefix('config.')} = {_short(a.get(name))}, not {_short(b.get(name))}" for name in names[:3]]
    return "; ".join(shown + [f"{len(names) - 3} more differences"] * (len(names) > 3))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) and item else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run at `path`.

    Raises:
        RunError: It is missing, damaged or newer than this version.
    """
    again = f"delete {path} and run its command again"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} has no {MANIFEST}, so it is not a run; check the path, or {again}.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path / MANIFEST} cannot be read ({error}); {again}.") from error
    needed = {"run_id", *_IDENTITY, *ATTEMPT}
    if not isinstance(manifest, dict) or manifest.get("kind") not in SCHEMAS or not needed <= manifest.keys():
        raise RunError(f"{path / MANIFEST} is not a manifest of a topmass run; {again}.")
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RunError(f"{path} has schema version {version}, this topmass reads {SCHEMA_VERSION}; upgrade topmass.")
    return manifest


def write_manifest(path: Path, value: Mapping[str, Any]) -> None:
    """Write the manifest of the run at `path`, whole or not at all."""
    path = path / MANIFEST
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
