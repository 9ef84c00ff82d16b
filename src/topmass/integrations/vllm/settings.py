"""What a user sets: the table `topmass` of `--additional-config`, a TOML file with the same keys, or one of `topmass frontier`."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.errors import ConfigError
from topmass.selection.indexer import Indexer, IndexerSelector, named_indexer
from topmass.selection.saved import VERSION

__all__ = ["Settings"]

Decode = Literal["dense", "sparse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an engine serves.

    Attributes:
        indexer: Directory that `topmass distill` or `Indexer.save` wrote.
        budget: Keys per query. `None` takes the plan's, or what the indexer recommends.
        plan: TOML file with a budget per layer. `None` gives every layer the same.
        granularity: `q_block`, else 1, and `kv_block`, else the indexer's. A block of queries that the scheduler cuts selects
            in both parts, so that with `q_block` above 1 answers depend on how prompts are cut.
        sink: Keys always read at the start, in tokens, inside the budget.
        window: Keys always read up to and including the query's own, in tokens, inside the budget.
        dense_below: Queries that see at most this many keys read them all; `"auto"` looks the device up in the indexer.
        decode: Whether generated positions read all keys or a support of their own.
        backend: Kernel backend of the sparse attention: `"auto"`, or a name, which never falls back.
        receipts: JSON lines file that a receipt of every finished request is appended to. `None` writes none.
        log_every: Seconds between two log lines with the totals; 0 logs none.
        indexer_digest: Digest that the indexer has to have. `None` takes any.

    Raises:
        ConfigError: A value is out of range or contradicts another.

    Example:
        >>> Settings.parse({"topmass": {"indexer": "out/indexer", "budget": 2048}}).budget
        Budget(tokens=2048, share=None, mass=None)
        >>> Settings.parse({"other": 1}) is None
        True
    """

    indexer: str
    budget: BudgetLike | None = None
    plan: str | None = None
    granularity: Mapping[str, int] = field(default_factory=dict)
    sink: int = 0
    window: int = 1
    dense_below: int | str = 0
    decode: str = "dense"
    backend: str = "auto"
    receipts: str | None = None
    log_every: float | int = 60.0
    indexer_digest: str | None = None

    def __post_init__(self) -> None:
        for name in ("indexer", "plan", "backend", "receipts", "indexer_digest"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (value is None and name not in ("indexer", "backend")):
                raise ConfigError(f"{name} must be a text that is not empty, got {value!r}.")
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.parse(self.budget))
            if self.plan is not None:
                raise ConfigError("budget and plan exclude each other: a plan holds the budgets; leave one out.")
        for name in ("sink", "window"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise ConfigError(f"{name} must be a whole number of at least 0, got {value!r}.")
        if self.dense_below != "auto" and (type(self.dense_below) is not int or self.dense_below < 0):
            raise ConfigError(f"dense_below must be a whole number of at least 0, or 'auto', got {self.dense_below!r}.")
        if self.decode not in get_args(Decode):
            raise ConfigError(f"decode must be 'dense' or 'sparse', got {self.decode!r}.")
        if not isinstance(self.granularity, Mapping) or set(self.granularity) - {"q_block", "kv_block"}:
            raise ConfigError(f"granularity takes q_block and kv_block, got {self.granularity!r}.")
        Granularity(q_block=self.granularity.get("q_block", 1), kv_block=self.granularity.get("kv_block", 1))
        if isinstance(self.log_every, bool) or not isinstance(self.log_every, int | float) or self.log_every < 0:
            raise ConfigError(f"log_every must be a number of seconds of at least 0, got {self.log_every!r}.")

    @classmethod
    def parse(cls, additional: Any) -> "Settings | None":
        """Settings in `--additional-config`, or `None` if topmass is not mentioned.

        Raises:
            ConfigError: A key is unknown, or a value is out of range.
            DataError: The file that `config` names cannot be read.
        """
        if not isinstance(additional, Mapping) or "topmass" not in additional:
            return None
        table = additional["topmass"]
        if not isinstance(table, Mapping):
            raise ConfigError(f"'topmass' in --additional-config must be a table, got {table!r}.")
        given = dict(table)
        if (file := given.pop("config", None)) is not None:
            given = _merge(_read(Path(str(file))), given)
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: config, {', '.join(known)}."
                raise ConfigError(f"Unknown key {key!r} of 'topmass' in --additional-config; {hint}")
        if "indexer" not in given:
            raise ConfigError("'topmass' in --additional-config needs 'indexer', the directory of a distilled indexer.")
        return cls(**given)

    def open(self) -> Indexer:
        """The indexer; `"reference"` is that of the reference checkpoint.

        Raises:
            ConfigError: It is not the one that the settings were measured with.
            DataError: It is missing or damaged.
        """
        indexer = named_indexer(self.indexer)
        if self.indexer_digest not in (None, indexer.digest):
            raise ConfigError(
                f"The indexer in {self.indexer} has the digest {indexer.digest}, the settings were measured with "
                f"{self.indexer_digest}; give the directory of that one."
            )
        return indexer

    def selector(self, indexer: Indexer, device: str) -> IndexerSelector:
        """The selector that these settings describe.

        Args:
            device: Name of the device, for `dense_below="auto"`.

        Raises:
            ConfigError: The settings do not fit the indexer.
        """
        granularity = indexer.info.granularity
        assert granularity is not None, "filled in by IndexerInfo"
        granularity = Granularity(
            q_block=self.granularity.get("q_block", 1), kv_block=self.granularity.get("kv_block", granularity.kv_block)
        )
        return indexer.selector(
            budget=self._budget(indexer),
            granularity=granularity,
            sink=self.sink,
            window=self.window,
            dense_below=self._dense_below(indexer, device),
        )

    def _budget(self, indexer: Indexer) -> Budget | Plan:
        if self.plan is not None:
            return Plan.load(self.plan)
        if self.budget is not None:
            return Budget.parse(self.budget)
        if indexer.info.recommended_budget is None:
            raise ConfigError(
                f'The indexer in {self.indexer} recommends no budget; give one, such as "budget": 2048, or a plan.'
            )
        return Budget.parse(indexer.info.recommended_budget)

    def _dense_below(self, indexer: Indexer, device: str) -> int:
        if isinstance(self.dense_below, int):
            return self.dense_below
        if device not in (table := indexer.info.crossover):
            raise ConfigError(
                f"dense_below='auto': the indexer has no measurement on {device!r} (it has: {', '.join(table) or 'none'}); "
                "give a number of tokens."
            )
        return table[device]


def _merge(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file, with those beside it in front."""
    # a budget and a plan each take the other's place, and another indexer needs no digest
    for key, other in (("budget", "plan"), ("plan", "budget"), ("indexer", "indexer_digest")):
        if key in given:
            file.pop(other, None)
    parts = [table.get("granularity", {}) for table in (file, given)]
    both = all(isinstance(part, Mapping) for part in parts)
    return file | given | ({"granularity": {**parts[0], **parts[1]}} if both and any(parts) else {})


def _read(path: Path) -> dict[str, Any]:
    table = _parse(path)
    return _of_frontier(path, table) if "selector" in table else table


# keys of a frontier's [selector] that are settings here under the same name
_SAME = ("indexer_digest", "budget", "sink", "window", "dense_below")


def _of_frontier(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file that `topmass frontier --toml` wrote."""
    if table.get("version") != VERSION or not isinstance(table["selector"], Mapping):
        raise ConfigError(
            f"{path} is not a selector of version {VERSION}; write it with `topmass frontier --toml` of this topmass."
        )
    chosen = dict(table["selector"])
    if (name := chosen.pop("name", None)) != "indexer":
        hint = (
            "leave 'topmass' out of --additional-config" if name == "dense" else "recommend an indexer's configuration"
        )
        raise ConfigError(f"{path} recommends {name!r}, and vLLM serves indexers alone; {hint}.")
    if (share := chosen.pop("share", "layer")) != "layer":
        raise ConfigError(f"{path} shares a selection by {share!r}; an indexer selects once for all heads of a layer.")
    where = chosen.pop("indexer", None)
    found = {key: chosen.pop(key) for key in _SAME if key in chosen}
    unit = {key: chosen.pop(key) for key in ("q_block", "kv_block") if key in chosen}
    if chosen:
        raise ConfigError(
            f"{path}: unknown key {min(chosen)!r} in [selector]; write it with `topmass frontier --toml`."
        )
    if isinstance(where, str):
        found["indexer"] = str(beside) if (beside := path.parent / where).is_dir() else where
    return found | ({"granularity": unit} if unit else {})


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the settings {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
