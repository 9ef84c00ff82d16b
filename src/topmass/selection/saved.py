"""A selector as TOML: what `topmass frontier` recommends and `topmass.sparsify` runs."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from topmass.core.granularity import Granularity
from topmass.errors import ConfigError
from topmass.selection.base import Selector
from topmass.selection.baselines import DenseSelector, PooledSelector, RandomSelector, StreamingSelector
from topmass.selection.indexer import Indexer, IndexerSelector, named_indexer
from topmass.selection.oracle import OracleSelector

__all__ = ["load_selector", "make_selector"]

VERSION = 1

_UNIT = ("q_block", "kv_block", "share")
_RANKED = ("budget", *_UNIT, "sink", "window", "dense_below")
# keys of [selector] by name
_KEYS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "streaming": ("sink", "window"),
    "indexer": (*_RANKED, "indexer", "indexer_digest"),
    "pooled": _RANKED,
    "oracle": (*_RANKED, "pool"),
    "random": (*_RANKED, "seed"),
}
_PLAIN = {"pooled": PooledSelector, "oracle": OracleSelector, "random": RandomSelector}


def load_selector(path: str | Path, *, indexer: Indexer | None = None) -> Selector:
    r"""Read a selector from the table `[selector]` of a TOML file; other tables are for people.

    Args:
        indexer: Takes the place of the directory that the file names, which is looked for beside the file, then here.

    Raises:
        ConfigError: The file cannot be read, has an unknown key, or a setting is out of range.
        DataError: The indexer that it names is missing or damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "serve.toml"
        >>> _ = path.write_text('version = 1\n[selector]\nname = "streaming"\nwindow = 64\n')
        >>> print(load_selector(path))
        streaming(sink=4, window=64)
    """
    path = Path(path)
    return make_selector(_read(path), source=str(path), beside=path.parent, indexer=indexer)


def make_selector(
    settings: Mapping[str, Any], *, source: str = "selector", beside: Path | None = None, indexer: Indexer | None = None
) -> Selector:
    """A selector from the keys of a table `[selector]`.

    Args:
        source: Where the settings come from, for messages.
        beside: Directory that the indexer's is looked for in first.
        indexer: Takes the place of the directory that the settings name.

    Raises:
        ConfigError: An unknown key, or a setting that is out of range.
        DataError: The indexer is missing or damaged.

    Example:
        >>> print(make_selector({"name": "streaming", "window": 64}))
        streaming(sink=4, window=64)
    """
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in _KEYS:
        raise ConfigError(f"{source}: name must be one of {', '.join(_KEYS)} in [selector], got {name!r}.")
    for key in settings:
        if key not in _KEYS[name]:
            near = difflib.get_close_matches(key, _KEYS[name], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{name} takes {', '.join(_KEYS[name]) or 'none'}."
            raise ConfigError(f"{source}: unknown key {key!r} in [selector]; {hint}")
    try:
        return _build(beside or Path(), name, settings, indexer)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{source}: a setting in [selector] is missing or of another type ({error}).") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the selector {path}: {error.strerror}; check the path.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    if data.get("version") != VERSION:
        raise ConfigError(
            f"{path}: version {data.get('version')!r} of a selector; this topmass reads version {VERSION}."
        )
    if not isinstance(data.get("selector"), dict):
        raise ConfigError(f"{path} has no table [selector]; write it with `topmass frontier --toml`.")
    return dict(data["selector"])


def _build(beside: Path, name: str, settings: dict[str, Any], indexer: Indexer | None) -> Selector:
    if name == "dense":
        return DenseSelector()
    if name == "streaming":
        return StreamingSelector(**settings)
    unit = {key: settings.pop(key) for key in _UNIT if key in settings}
    if unit:
        settings["granularity"] = Granularity(**unit)
    if name != "indexer":
        return _PLAIN[name](**settings)
    where, digest = settings.pop("indexer", None), settings.pop("indexer_digest", None)
    found = indexer or _find(beside, where)
    if digest is not None and found.digest != digest:
        raise ConfigError(f"the indexer has the digest {found.digest}, the file was measured with {digest}.")
    return IndexerSelector(found, **settings)


def _find(folder: Path, where: object) -> Indexer:
    if not isinstance(where, str):
        raise ConfigError("the selector is an indexer, so give its directory as `indexer`, or pass indexer=.")
    beside = folder / where
    return named_indexer(str(beside) if where != "reference" and beside.is_dir() else where)
