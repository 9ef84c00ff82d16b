"""`topmass frontier`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from topmass.cli._common import check_directory, emit, print_table, say
from topmass.errors import ConfigError, RunError

if TYPE_CHECKING:
    from topmass.report.frontier import Frontier, Point, Recommendation
    from topmass.results import LoadedRun
    from topmass.selection.indexer import Indexer

__all__ = ["frontier"]


def frontier(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    length: int | None = None,
    out: Path | None = None,
    toml: Path | None = None,
    store_crossover: Path | None = None,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Join evaluations and times to first token; mark the frontier and recommend a configuration.

    Args:
        runs: Run directories of `topmass bench ttft` and `topmass eval` of one model, or directories of them.
        length: Prompt length to recommend for; default the longest with measured quality.
        out: Directory of the report; default `frontier` in the first of the runs.
        toml: Where the recommended configuration goes; default `recommended.toml` in that directory.
        store_crossover: Directory of the indexer whose `indexer.json` takes the crossover for this device.
        json: Print points and the recommendation as JSON.
        config: Recipe (TOML) with a table `[frontier]`.
    """
    from topmass.report import build
    from topmass.report.frontier import find_frontier, recommend
    from topmass.report.ttft_text import frontier_table
    from topmass.results import find_runs, load_run

    out = out or runs[0] / "frontier"
    toml = toml or out / "recommended.toml"
    loaded = [load_run(p) for p in dict.fromkeys(p.resolve() for given in runs for p in find_runs(given))]
    indexer = _check_outputs(out, toml, store_crossover)
    found = find_frontier(loaded)
    chosen = recommend(found, length)
    for n in found.points:
        caption, header, rows = frontier_table(found, n)
        print_table(caption.partition(":")[0], header, [[_brief(text) for text in row] for row in rows])
    say(f"at {chosen.length} tokens: {chosen.text}")
    command = shlex.join(["topmass", "frontier", *map(str, runs), "--out", str(out)])
    paths = build([run.path for run in loaded if run.kind in ("ttft", "eval")], out, command=command)
    say(f"wrote {paths.html} and {paths.markdown}")
    written = _recommended(chosen, found, loaded, toml)
    if store_crossover is not None and indexer is not None:
        _store(store_crossover, indexer, chosen, found)
    if json:
        emit(_summary(found, chosen) | {"html": str(paths.html), "markdown": str(paths.markdown), "toml": written})


def _check_outputs(out: Path, toml: Path, store: Path | None) -> "Indexer | None":
    """Refuse what could not be written in the end; the indexer that takes the crossover."""
    check_directory(out, "--out")
    check_directory(toml.parent, "--toml")
    if toml.is_dir():
        raise RunError(f"Cannot write {toml}: it is a directory. Choose another --toml.")
    if store is None:
        return None
    from topmass.selection.indexer import Indexer

    indexer = Indexer.load(store)
    check_directory(store, "--store-crossover")
    return indexer


def _brief(text: str) -> str:
    return "not measured" if text.startswith("not measured") else text.replace("**", "")


def _recommended(chosen: "Recommendation", found: "Frontier", runs: "list[LoadedRun]", path: Path) -> str | None:
    """Write the recommendation, if scores stand behind it."""
    from topmass.report.frontier import to_toml

    if not chosen.decided:
        say("no configuration was written: evaluate what was timed with `topmass eval`, on the same weights")
        return None
    _write(path, to_toml(chosen, found, indexers=_indexers(runs), runs=[run.id for run in runs]))
    say(f"wrote {path}: topmass.load_selector reads it")
    return str(path)


def _indexers(runs: "list[LoadedRun]") -> dict[str, str]:
    """Directory of each timed indexer by its digest."""
    return {d: path for run in runs if run.kind == "ttft" for d, path in run.manifest["config"]["indexers"].items()}


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror}. Choose another --toml.") from error


def _store(path: Path, indexer: "Indexer", chosen: "Recommendation", found: "Frontier") -> None:
    if chosen.point.setting.selector != "indexer":
        raise ConfigError("The recommended configuration is no indexer's, so there is no crossover to store in one.")
    below = chosen.crossover.dense_below
    if below is None:
        raise ConfigError(
            "The crossover lies below every length that was timed; time shorter prompts with `topmass bench ttft --lengths`."
        )
    # as topmass.selection.crossover names a device
    device = "cpu" if found.device.startswith("cpu") else found.device
    indexer.info = indexer.info.replace(crossover={**indexer.info.crossover, device: below})
    indexer.save(path)
    say(f"stored crossover {below} for {device} in {path}")


def _summary(found: "Frontier", chosen: "Recommendation") -> dict[str, Any]:
    return {
        "model": found.model,
        "stress": found.stress,
        "device": found.device,
        "batch": found.batch,
        "chunk": found.chunk,
        "points": {str(n): [_shown(p) for p in points] for n, points in found.points.items()},
        "recommended": {
            "length": chosen.length,
            "text": chosen.text,
            "decided": chosen.decided,
            "point": _shown(chosen.point),
            "crossover": asdict(chosen.crossover),
        },
    }


def _shown(point: "Point") -> dict[str, Any]:
    return asdict(point) | {"enough": point.enough, "faster": point.faster, "diagnostic": point.diagnostic}
