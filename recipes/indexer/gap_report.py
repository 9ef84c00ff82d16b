"""The report on the gaps: loads the runs and writes `gaps.md`, the answer first."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from choice import choice_parts
from common import NINE, TENTH
from compared import LARGEST, SHARED
from found import Found, load_parts, pooled, real_gaps
from gap_tables import (
    SERVED,
    STEPS,
    gap_table,
    layer_parts,
    layers_together,
    points,
    score_table,
    sentence,
    task_parts,
    task_table,
)
from promises import Check, checks, promise_table

from topmass.results import LoadedRun


def report(args: argparse.Namespace) -> int:
    """Print tables and checks, and write them."""
    runs = load_parts(args.out, "test")
    if not runs:
        sys.exit(f"There is no complete run test-LENGTH in {args.out}; run the part `test` first.")
    nine, ten = Found(runs, NINE), Found(runs)
    found = checks(runs, nine, ten)
    config = runs[0].manifest["config"]
    single = load_parts(args.out, "layers")
    uniform = load_parts(args.uniform or args.out.with_name(f"{args.out.name}-uniform"), "test")
    backends = sorted({r["backend"] for run in runs for r in run.records if r["config"] != "dense" and r["backend"]})
    note = (
        f"Budget: {config['budget']} of the context. {devices(runs)}; bfloat16, begun {runs[0].manifest['started'][:10]}. Intervals resample haystacks. "
        f"Sparse attention ran on the backend {sentence(backends)}; what a kernel costs beside reference arithmetic, the [fourth gap](../../docs/concepts/gaps.md), is measured with [whole models](../../docs/results/transformers.md)."
    )
    parts = [
        "## In short",
        f"What the indexer that ships with the package loses on the bundled model, in points of score below the same model with dense attention, with paired 95 % intervals. "
        f"`{TENTH}` came after the nine tasks over which the average was defined, so it counts in the ten only.",
        *short_parts(runs, nine, ten, found, single=single, uniform=uniform, out=args.out),
        note,
        *stopped(runs),
        "## Gaps",
        "Points, by context. Each figure is taken on the samples that its two sides share: those with the oracle or the shared selection rest on fewer haystacks, so the "
        "steps add up to dense minus indexer only nearly. A negative gap gains.",
        gap_table(nine, ten),
    ]
    if uniform:
        parts += [f"## {LARGEST} in every layer", *uniform_parts(uniform)]
    parts += ["## Points below dense, by task", *task_parts(ten)]
    unnamed = "" if (args.out / "choice.json").is_file() else config["budget"]
    if layered := layer_parts(single, real_gaps(ten), args.out, budget=unnamed):
        parts += ["## One sparse layer, the others dense: points below dense", *layered]
    if chosen := load_parts(args.out, "choose"):
        parts += ["## How the budget was chosen", *choice_parts(chosen)]
    parts += [
        "## Scores",
        'A query attends to itself and to what comes before it, so dense attention reads half of the context in the mean. The pooled selector takes groups of 16 keys; "previous layer" '
        "takes the oracle's keys of the full-attention layer before, and in the first one the oracle's own.",
        score_table(nine, ten),
        "## Checks",
        "\n".join(f"- {c}" for c in found),
    ]
    text = "\n\n".join(parts) + "\n"
    (args.out / "gaps.md").write_text(text)
    print(text)
    return 0 if all(c.holds for c in found) else 1


def short_parts(
    runs: Sequence[LoadedRun],
    nine: Found,
    ten: Found,
    found: Sequence["Check"],
    *,
    single: Sequence[LoadedRun] = (),
    uniform: Sequence[LoadedRun] = (),
    out: Path | None = None,
) -> list[str]:
    """What was to be shown and whether it holds, and the rest of the answer in a few lines."""
    name, together = pooled(ten.lengths)[-1]
    where = sentence([f"{n:,}" for n in together], ticks=False) + " tokens" + " together" * (name == "together")

    def both(a: str, b: str, lengths: Sequence[int]) -> str:
        return f"{points(nine.difference(a, b, lengths))} points on nine tasks and {points(ten.difference(a, b, lengths))} on ten"

    keys = ", ".join(f"{ten.keys('indexer', n):,.0f}" for n in ten.lengths)
    by_length = "; ".join(f"{n:,}: {points(nine.difference('dense', 'indexer', [n]))}" for n in ten.lengths)
    lines = [
        f"**What it loses.** {both('dense', 'indexer', together)} against dense attention ({where}), reading {keys} keys per query. By length, nine tasks: {by_length}.",
    ]  # fmt: skip
    if uniform:
        lines.append(f"**With {LARGEST} in every layer** {uniform_words(uniform)}")
    losing = real_gaps(ten)
    alone = f" {layers_together(Found(single))}" if single and len(Found(single).tasks) > 1 else ""
    lines.append(
        f"**Where.** A real gap, its whole interval above zero at one length or together, remains on {sentence(losing)} and on no other task of the {len(ten.tasks)}."
        + (f" With one sparse layer at a time, on {alone.strip()}" if alone else "")
        if losing
        else "**Where.** On no task does the whole interval of the indexer's loss lie above zero."
    )
    if ten.difference("indexer", "indexer shared", together) is not None:
        worst = {t: ten.difference("indexer", "indexer shared", together, t) for t in ten.tasks}
        where_lost = [f"`{t}` {points(i)}" for t, i in worst.items() if i is not None and i.low > 0]
        lines.append(
            f"**Sharing.** One selection for {SHARED} queries loses another {both('indexer', 'indexer shared', together)}: {', '.join(where_lost)}."
        )
    failed = [c.name for c in found if not c.holds]
    lines.append(
        f"**[Checks](#checks) with this budget.** {len(found) - len(failed)} of {len(found)} hold"
        + (f"; not: {'; '.join(failed)}." if failed else ".")
    )
    return [promise_table(runs, nine, found, uniform, out), "\n".join(f"- {line}" for line in lines)]


def uniform_words(runs: Sequence[LoadedRun]) -> str:
    """What the largest permitted budget in every layer loses, with and without hindsight."""
    found = {"nine": Found(runs, NINE), "ten": Found(runs)}
    together = pooled(found["ten"].lengths)[-1][1]

    def shown(a: str, b: str) -> str:
        nine, ten = (points(f.difference(a, b, together)) for f in found.values())
        return f"{nine} points (nine tasks) and {ten} (ten)"

    return f"the indexer loses {shown('dense', 'indexer')}, the oracle {shown('dense', 'oracle')}, and the indexer against the oracle {shown('oracle', 'indexer')}."


def uniform_parts(runs: Sequence[LoadedRun]) -> list[str]:
    """The same test with the largest permitted budget in every layer."""
    nine, ten = Found(runs, NINE), Found(runs)
    failed = [c for c in checks(runs, nine, ten) if not c.holds]
    counted = sentence(sorted({f"{ten.haystacks('indexer', n)}" for n in ten.lengths}), ticks=False)
    far = sentence(sorted({f"{ten.haystacks('random', n)}" for n in ten.lengths}), ticks=False)
    steps = [step for step in STEPS if step[2] != "indexer shared"]
    return [
        f"The same samples, indexer and selectors, with {LARGEST} of the context in each full-attention layer instead of {LARGEST} in the mean; {counted} haystacks a task and length, baselines {far}. "
        f"{devices(runs)}. [Scores and every check](../../benchmarks/{runs[0].path.parent.name}/gaps.md).",
        *stopped(runs),
        gap_table(nine, ten, steps),
        *task_table(ten, real_gaps(ten), SERVED[:2]),
        "Checks that fail with this budget:\n\n" + "\n".join(f"- {c}" for c in failed) if failed else "All checks hold with this budget.",
    ]  # fmt: skip


def devices(runs: Sequence[LoadedRun]) -> str:
    """Where each length ran; more than one device where a run was resumed on another."""
    by_device: dict[str, list[str]] = {}
    for run in runs:
        used = [a["device"] for a in run.manifest.get("attempts", [])] or [run.manifest["device"]]
        name = " and ".join(dict.fromkeys(d.partition(",")[0] for d in used))
        by_device.setdefault(name, []).append(f"{run.manifest['config']['length']:,}")
    return "; ".join(f"{name} ({', '.join(lengths)} tokens)" for name, lengths in by_device.items())


def stopped(runs: Sequence[LoadedRun]) -> list[str]:
    """A sentence on runs that were published before they were complete."""
    cut = [f"{r.manifest['config']['length']:,} tokens: {r.manifest['stopped']}" for r in runs if r.manifest.get("stopped")]  # fmt: skip
    return [f"Published incomplete: {'; '.join(cut)}."] if cut else []
