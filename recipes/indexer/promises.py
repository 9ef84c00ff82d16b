"""What must hold of the shipped indexer: the checks, and the table of what was to be shown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import NINE, Shares
from compared import FAR_ROLES, LARGEST, LENGTHS
from found import Found, pooled
from gap_tables import points, table

from topmass.results import LoadedRun

# in fractions of the full score
FAR, POINT, HIGH, SAMPLES = 0.15, 0.01, 0.02, 300


@dataclass(frozen=True, slots=True)
class Check:
    """One criterion, whether it holds, and the numbers."""

    name: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.holds else 'FAIL'}  {self.name}: {self.detail}"


def checks(runs: Sequence[LoadedRun], nine: Found, ten: Found) -> list[Check]:
    """What must hold of the shipped indexer."""
    config = runs[0].manifest["config"]
    shares = Shares.parse(config["budget"])
    together = pooled(ten.lengths)[-1][1]
    found = [
        Check("the three lengths ran", set(LENGTHS) <= set(ten.lengths), f"{ten.lengths}"),
        Check(
            "budget at most 1/16 of the context, mean over the full-attention layers",
            shares.mean <= LARGEST,
            f"{shares}: mean {shares.mean}, largest {max(shares.shares)}",
        ),
        _fresh(runs),
        _enough(ten),
    ]  # fmt: skip
    found += [_far(nine, name, label, lengths) for name, lengths in pooled(ten.lengths) for label in FAR_ROLES[:3]]
    found.append(
        _near(nine, f"indexer within 1 point of dense at {', '.join(map(str, together))}, nine tasks", together)
    )
    found.append(_near(ten, "the same, ten tasks", together))
    trained = int(config.get("trained_length") or 0)
    beyond = [n for n in ten.lengths if trained and n >= 2 * trained]
    name = f"the same at one length twice beyond the {trained} trained at"
    tries = [_near(nine, f"{name}: {n}", [n]) for n in beyond]
    found.append(next((c for c in tries if c.holds), tries[0] if tries else Check(name, False, "no such length ran")))
    return found


def _fresh(runs: Sequence[LoadedRun]) -> Check:
    dev = {s for run in runs for s in [run.manifest["config"].get("dev_seed")] if s is not None}
    test = {run.manifest["seeds"]["tasks"] for run in runs}
    path = runs[0].path.parent / "choice.json"
    if path.is_file():
        dev.add(json.loads(path.read_text())["seed"])
    name = "budget chosen on other seeds"
    if not dev and Shares.parse(runs[0].manifest["config"]["budget"]).shares == (LARGEST,):
        return Check(name, True, f"{LARGEST} is the bound itself, chosen on no sample")
    return Check(name, bool(dev) and not dev & test, f"chosen on {sorted(dev)}, tested on {sorted(test)}")


def _enough(found: Found) -> Check:
    counts = [
        sum(r["config"] == label and r["task"] == task for r in found.rows[n])
        for n in found.lengths
        if n in LENGTHS
        for task in found.tasks
        for label in ("dense", "indexer")
    ]
    least = min(counts, default=0)
    return Check(f"{SAMPLES} samples a task and length, dense and indexer", least >= SAMPLES, f"{least}")


def _far(found: Found, name: str, label: str, lengths: Sequence[int]) -> Check:
    loss = found.difference("dense", label, lengths)
    return Check(
        f"{label} at least 15 points under dense, {name}", loss is not None and loss.point >= FAR, points(loss)
    )


def _near(found: Found, name: str, lengths: Sequence[int]) -> Check:
    loss = found.difference("dense", "indexer", lengths)
    return Check(name, loss is not None and loss.point <= POINT and loss.high <= HIGH, points(loss))


def promise_table(
    runs: Sequence[LoadedRun], nine: Found, found: Sequence["Check"], uniform: Sequence[LoadedRun], out: Path | None
) -> str:
    """What was to be shown, what came out, and whether it holds."""
    shares = Shares.parse(runs[0].manifest["config"]["budget"])
    enough, near, ten, beyond = (
        next(c for c in found if c.name.startswith(name))
        for name in (f"{SAMPLES} samples", "indexer within", "the same, ten", "the same at one")
    )
    at = beyond.name.partition(": ")[2]
    kept = "yes" if max(shares.shares) <= LARGEST else "in the mean, not in every layer"
    weakest = min(
        ((loss.point, label, loss) for label in FAR_ROLES[:3] for _, lengths in pooled(nine.lengths) if (loss := nine.difference("dense", label, lengths))),
        default=None,
    )  # fmt: skip
    far = [c for c in found if " points under dense, " in c.name]
    rows = [
        ["at most 1 point below dense, its interval ending at 2 or less; all lengths together, nine tasks", near.detail, answer(near.holds)],
        ["the same on ten tasks", ten.detail, answer(ten.holds)],
        ["the same at one length twice beyond its training, nine tasks", f"{int(at):,} tokens: {beyond.detail}" if at else beyond.detail, answer(beyond.holds)],
        [f"with a budget of at most {LARGEST} of the context", f"{', '.join(map(str, shares.shares))} by layer, mean {shares.mean}", kept if shares.mean <= LARGEST else "no"],
    ]  # fmt: skip
    if uniform:
        there = checks(uniform, Found(uniform, NINE), Found(uniform))
        rows += [
            [f"the same with {LARGEST} in every layer, {tasks} tasks", c.detail, answer(c.holds)]
            for tasks, prefix in (("nine", "indexer within"), ("ten", "the same, ten"))
            for c in there
            if c.name.startswith(prefix)
        ]
    rows += [
        ["with the same budget streaming, random and an untrained indexer each at least 15 points below dense, at each length", f"nearest: {weakest[1]}, {points(weakest[2])}" if weakest else "not run", answer(all(c.holds for c in far))],
        [f"at least {SAMPLES} samples a task and length", enough.detail, answer(enough.holds)],
        *(cost_rows(out) if out else []),
    ]  # fmt: skip
    return table(["to be shown", "measured", "holds"], rows)


def answer(holds: bool) -> str:
    return "yes" if holds else "**no**"


def cost_rows(out: Path) -> list[list[str]]:
    """What distillation costs, as far as it was measured."""
    found = {p.stem: json.loads(p.read_text()) for p in (out / f"{n}.json" for n in ("memory", "two-gpus", "kill")) if p.is_file()}  # fmt: skip
    rows = []
    if about := found.get("memory"):
        rows.append(
            [f"distillation step of a model of the shape `{about['shape']}` at {about['tokens']:,} tokens: at most {about['target']} times the dense forward",
             f"{about['ratio']:.2f} times, peak {max(m['peak_gib'] for m in about['modes'].values()):.1f} GiB", answer(about["ratio"] <= about["target"])]
        )  # fmt: skip
    for name, what in (
        ("two-gpus", "two GPUs have the loss curve of one, within noise"),
        ("kill", "a training that is killed and resumed ends like one left alone"),
    ):
        if about := found.get(name):
            judged = [c for c in about["checks"] if c.startswith(("PASS", "FAIL"))]
            rate = f"; {about['throughput_ratio']:.2f} times the throughput" if "throughput_ratio" in about else ""
            rows.append([what, judged[-1].partition(": ")[2] + rate, answer(not any(c.startswith("FAIL") for c in judged))])  # fmt: skip
    return rows
