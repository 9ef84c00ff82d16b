"""From runs to the content of a report: what is said, by kind of run, and the facts beside it."""

from collections.abc import Sequence
from typing import Any

from topmass.report import audit_text, bench, bench_figures, eval_text, gaps_text, serve, ttft_figures, ttft_text
from topmass.report.aggregate import AuditTable, EvalTable, Setting
from topmass.report.content import Figure, Report, Section, Table, add_figure
from topmass.report.figures import tokens
from topmass.report.frontier import find_frontier
from topmass.report.timings import BenchTable
from topmass.report.wording import ENOUGH, NOT_CAUSAL
from topmass.results import LoadedRun

__all__ = ["compose"]

QUESTION = "How much dense attention does this model need?"
FRONTIER_QUESTION = "Which configuration is as good as dense attention, and faster?"
TTFT_QUESTION = "How long does the first token take beside dense attention and the floor?"
SERVE_QUESTION = "How does a serving engine answer requests with sparse prefill, beside dense attention and the floor?"
BENCH_QUESTION = "How long does a sparse layer take beside dense kernels?"


def compose(runs: Sequence[LoadedRun], *, command: str) -> Report:
    """Make the report of runs of one model.

    Args:
        runs: Evaluation runs, audit runs, or both; benchmark runs; or times to first token, alone or with evaluations.
        command: How this report is made again.
    """
    if all(run.kind == "bench" for run in runs):
        return _compose_bench(runs, command)
    if all(run.kind == "serve" for run in runs):
        return _compose_serve(runs, command)
    if any(run.kind == "ttft" for run in runs):
        return _compose_frontier(runs, command)
    evals = EvalTable([run for run in runs if run.kind == "eval"])
    audits = AuditTable([run for run in runs if run.kind == "audit"])
    scored = bool(evals.variant and evals.dense())
    answers = eval_text.answers(evals) if scored else []
    answers += audit_text.answers(audits)[-1 if scored else 0 :]
    answers += gaps_text.answers(evals) if scored else []
    if not scored and answers:
        answers.append("Whether scores on tasks hold at these budgets was not measured.")
    sections = [*eval_text.sections(evals), *audit_text.sections(audits)]
    figure, sections = _lead(sections)
    return Report(
        model=runs[0].manifest["model"],
        question=QUESTION,
        answers=answers or ["These runs do not say: no oracle beside dense attention, and no audit."],
        figure=figure,
        facts=_facts(runs, command),
        notes=_notes(evals, audits, runs),
        sections=sections,
    )


def _compose_bench(runs: Sequence[LoadedRun], command: str) -> Report:
    table = BenchTable(runs)
    titles = {"layer": "The layer", "oracle": "The oracle", "kl": "The indexer's loss"}
    sections = []
    for what, title in titles.items():
        items: list[Figure | Table] = []
        for name, draw, caption in bench_figures.FIGURES:
            add_figure(items, f"{what}-{name}", draw(table, what), caption)
        items += [Table(caption=c, header=h, rows=r) for c, h, r in bench.summaries(table, what)]
        items += [Table(caption=c, header=h, rows=r, folded=True) for c, h, r in bench.tables(table, what)]
        sections += [Section(title=title, items=items)] if items else []
    figure, sections = _lead(sections)
    return Report(
        model=runs[0].manifest["model"],
        question=BENCH_QUESTION,
        answers=bench.answers(table),
        figure=figure,
        facts=_facts(runs, command),
        notes=bench.notes(table),
        sections=sections,
    )


def _compose_serve(runs: Sequence[LoadedRun], command: str) -> Report:
    table, manifest = serve.ServeTable(runs), runs[0].manifest
    items: list[Figure | Table] = []
    caption = "Time to first token against length, bars are p10 to p90 over requests."
    add_figure(items, "serve-ttft", serve.ttft_by_length(table, manifest["model"], manifest["device"]), caption)
    items += [Table(caption=c, header=h, rows=r) for c, h, r in serve.tables(table)]
    figure, sections = _lead([Section(title="Requests", items=items)])
    return Report(
        model=manifest["model"] + ("" if manifest["weights_hash"] else " (random weights)"),
        question=SERVE_QUESTION,
        answers=serve.answers(table),
        figure=figure,
        facts=_facts(runs, command),
        notes=serve.notes(runs),
        sections=sections,
    )


def _compose_frontier(runs: Sequence[LoadedRun], command: str) -> Report:
    frontier = find_frontier(runs)
    evals = EvalTable([run for run in runs if run.kind == "eval"])
    items: list[Figure | Table] = []
    # random weights have no scores to stand beside times
    for n in () if frontier.stress else reversed(frontier.points):
        caption = (
            f"Score minus dense's, paired, against time at {tokens(n)} tokens; bars are 95 % intervals. The line is the frontier; "
            "hollow marks see the model's own attention, or nothing, and are not for serving."
        )
        add_figure(items, f"frontier-{n}", ttft_figures.score_by_time(frontier, n), caption)
        caption, header, rows = ttft_text.frontier_table(frontier, n)
        items.append(Table(caption=caption, header=header, rows=rows))
    times: list[Figure | Table] = []
    against = " against length" if len(frontier.table.line(frontier.batch, frontier.chunk)) > 1 else ""
    caption = f"Time to first token{against}, bars are p10 to p90; of the selectors the fastest."
    add_figure(times, "ttft", ttft_figures.ttft_by_length(frontier), caption)
    times += [Table(caption=c, header=h, rows=r) for c, h, r in ttft_text.times_tables(frontier)]
    sections = [Section(title="Score and time of the same configurations", items=items)] if items else []
    sections += [Section(title="Times to first token", items=times), *eval_text.sections(evals)]
    figure, sections = _lead(sections)
    return Report(
        model=frontier.model + (" (random weights)" if frontier.stress else ""),
        question=FRONTIER_QUESTION if evals.lengths else TTFT_QUESTION,
        answers=ttft_text.answers(frontier),
        figure=figure,
        facts=_facts(runs, command),
        notes=ttft_text.notes(frontier, runs),
        sections=sections,
    )


def _lead(sections: list[Section]) -> tuple[Figure | None, list[Section]]:
    """Move the first figure to the first screen."""
    for i, section in enumerate(sections):
        for item in section.items:
            if isinstance(item, Figure):
                rest = Section(
                    title=section.title, text=section.text, items=[x for x in section.items if x is not item]
                )
                keep = [rest] if rest.items else []
                return item, [*sections[:i], *keep, *sections[i + 1 :]]
    return None, sections


def _notes(evals: EvalTable, audits: AuditTable, runs: Sequence[LoadedRun]) -> list[str]:
    notes = []
    if evals.variant:
        notes.append(f"Enough means {ENOUGH}, paired on the same samples.")
        notes.append("The oracle selects by the model's own attention mass; it is a diagnostic, not an accelerator.")
        if len({v for s in evals.settings if s.selector == "oracle" and (v := s.variant())}) > 1:
            notes.append(
                f"The figures show the oracle with {_variant(evals.variant)}; the others are in the last tables."
            )
    if any(not s.causal for s in [*evals.settings, *audits.settings]):
        notes.append(f"Settings in which queries share: {NOT_CAUSAL}.")
    if evals.repeated:
        notes.append(f"{evals.repeated:,} samples occur in more than one run; the latest run counts.")
    if changed := [run.id for run in runs if _environments(run) > 1]:
        notes.append(f"Resumed with other versions or on another device: {', '.join(changed)} (see the manifests).")
    return notes


def _variant(s: Setting) -> str:
    return f"share={s.share}, pool={s.pool}, sink={s.sink}, window={s.window}, decode={s.decode}{s.notes}"


def _environments(run: LoadedRun) -> int:
    attempts: list[dict[str, Any]] = run.manifest.get("attempts", [])
    return len({str([a.get(name) for name in ("versions", "git_commit", "device")]) for a in attempts})


def _facts(runs: Sequence[LoadedRun], command: str) -> list[tuple[str, str]]:
    first = runs[0].manifest
    facts = [("model", f"{first['model']} (weights {(first.get('weights_hash') or 'not hashed')[:12]})")]
    facts += [("machine", text) for text in dict.fromkeys(_machine(run.manifest) for run in runs)]
    facts += [("versions", text) for text in dict.fromkeys(_versions(run.manifest) for run in runs)]
    facts += [("reproduce", text) for text in dict.fromkeys([*(run.manifest["command"] for run in runs), command])]
    facts += [("run", f"{run.id}, {len(run.records):,} records, finished {run.manifest['finished']}") for run in runs]
    return facts


def _machine(manifest: dict[str, Any]) -> str:
    m = manifest["machine"]
    return f"{manifest['device']}; {m['processor']}, {m['cores']} cores, {m['system']}"


def _versions(manifest: dict[str, Any]) -> str:
    commit = manifest.get("git_commit")
    text = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"{text}, commit {commit[:10] + '+' * commit.endswith('+')}" if commit else text
