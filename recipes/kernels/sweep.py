"""Launch settings of the kernels: every candidate compiled, checked and timed on one GPU. The tables in `ops/*/_triton.py` come from here.

    PYTHONPATH=src python recipes/kernels/sweep.py --out benchmarks/kernels/sweep.json --seconds 110

Cases come in order of their value. Processes without a GPU compile all candidates into Triton's cache while those before are
measured: each is compared with the result of the first, then timed in interleaved rounds; one that is 1.3 times behind in the
first three is dropped. What cannot be compiled or launched is recorded with its reason. What does not fit in the time is
recorded as not reached; the same command on the same device goes on with it.
`--small` runs tiny cases in Triton's interpreter, to try the command on a CPU.
"""

import argparse
import faulthandler
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import TimeoutError as NotYet
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from statistics import median
from typing import Any

if "--small" in sys.argv and __name__ == "__main__":
    # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
from sweep_cases import DEVICE, Case, Config, Draw, Work, plan
from sweep_compile import compile_one, only_compile, reason

import topmass
from topmass.bench.timing import time_rounds
from topmass.ops._triton_common import INTERPRETED

# of a block's shared memory on Hopper, where no device says
ROOM = 232448
# times behind the fastest in the first round, and within which one entry serves several cases
DROPPED, SAME = 1.3, 1.03
ROUNDS, SCREENING = 7, 3
# seconds that a candidate's first run may take; a kernel that hangs ends everything
HANG = 30
Row = dict[str, Any]


# -- measuring


class Clock:
    """Seconds left."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        return self.seconds - self.spent


def measure(case: Case, jobs: list[tuple[Config, AsyncResult[Row] | None]], clock: Clock) -> list[Row]:
    """Every candidate's row: compiled, compared with the first that runs, timed."""
    work, rows, wanted = case.open(Draw(DEVICE)), [], None
    for config, job in jobs:
        row: Row = {"config": config, "status": "ok"} | compiled(job, clock)
        rows.append(row)
        if row["status"] != "ok":
            continue
        if not INTERPRETED:
            faulthandler.dump_traceback_later(HANG, exit=True)
        begin = time.monotonic()
        try:
            result = work.result(config)
            wanted = result if wanted is None else wanted
            row["error"], row["differing"] = work.error(result, wanted)
            row["first_seconds"] = time.monotonic() - begin
            row["status"] = "ok" if row["error"] <= 1 else "wrong"
        except Exception as error:
            row |= {"status": "does not launch", "reason": reason(error)}
        finally:
            if not INTERPRETED:
                faulthandler.cancel_dump_traceback_later()
    del wanted
    timed(work, [row for row in rows if row["status"] == "ok"])
    return rows


def compiled(job: AsyncResult[Row] | None, clock: Clock) -> Row:
    """What compilation said, if it is done in time."""
    if job is None:
        return {} if clock.left > 0 else {"status": "not reached"}
    try:
        return job.get(max(min(clock.left, 60.0), 0.0))
    except NotYet:
        return {"status": "not reached"}


def timed(work: Work, rows: list[Row]) -> None:
    """Add the times in milliseconds; who is far behind in the first rounds, today's entry aside, is left out of the others."""
    found: list[list[float]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for rounds in (SCREENING, ROUNDS - SCREENING):
        fns = {i: lambda i=i: work.run(rows[i]["config"]) for i in alive}
        if not fns:
            return
        times = time_rounds(fns, gate=lambda: None, rounds=rounds, warm=alive, device=DEVICE).milliseconds
        for i in alive:
            found[i] += times[i]
        # the fastest time: a first one may find the caches cold
        best = min(min(found[i]) for i in alive)
        alive = [i for i in alive if i == 0 or min(found[i]) <= DROPPED * best]
    for i, row in enumerate(rows):
        row |= {"ms": median(found[i]), "low": min(found[i]), "high": max(found[i])}
        row["status"] = "ok" if i in alive else "dropped"


def conclude(case: Case, rows: list[Row]) -> Row:
    """The case's record: rows, winner, and how today's settings compare."""
    ok = [row for row in rows if row["status"] == "ok"]
    winner = min(ok, key=lambda row: row["ms"], default=None)
    # the first candidate
    today = rows[0].get("ms")
    return {
        "op": case.op, "name": case.name, "key": case.key, "case": asdict(case), "today": rows[0]["config"],
        "winner": winner and winner["config"], "today_over_winner": today / winner["ms"] if winner and today else None,
        "entries": rows,
    }  # fmt: skip


def describe(record: Row) -> Iterator[str]:
    """A few lines for a terminal: candidates from fast to slow."""
    ratio = record["today_over_winner"]
    yield f"{record['op']}  {record['name']}" + ("" if ratio is None else f"  today's {ratio:.3f} x the fastest")
    # long where compilation was not found in the cache
    first = sum(row.get("first_seconds", 0.0) for row in record["entries"])
    yield f"  {' '.join(record['today'])}   (first runs {first:.1f} s)"
    for row in sorted(record["entries"], key=lambda row: row.get("ms", math.inf)):
        config = " ".join(f"{v:>{len(n)}}" for n, v in row["config"].items())
        mark = "*" if row["config"] == record["today"] else " "
        time_ = f"{row['ms']:9.3f} ms [{row['low']:.3f}-{row['high']:.3f}]" if "ms" in row else ""
        status = "" if row["status"] == "ok" else f" {row['status']} {row.get('reason', '')[:120]}"
        differing = f" {row['differing']} differ, {row['error']:.2f} of the tolerance" if row.get("differing") else ""
        yield f"{mark} {config} {time_}{differing}{status}"


def tables(records: list[Row]) -> list[Row]:
    """For every entry of a table, the settings whose worst case is nearest to that case's fastest."""
    found = []
    for key in dict.fromkeys(record["key"] for record in records):
        mine = [record for record in records if record["key"] == key and record["winner"]]
        ratios: dict[str, list[float]] = {}
        for record in mine:
            best = min(row["ms"] for row in record["entries"] if row["status"] == "ok")
            for row in record["entries"]:
                if "ms" in row:
                    ratios.setdefault(json.dumps(row["config"]), []).append(row["ms"] / best)
        everywhere = {config: max(r) for config, r in ratios.items() if len(r) == len(mine)}
        if everywhere:
            config = min(everywhere, key=lambda c: everywhere[c])
            today = max((record["today_over_winner"] or math.inf) for record in mine)
            found.append({
                "key": key, "cases": [record["name"] for record in mine], "config": json.loads(config), "worst": everywhere[config],
                "one_entry_serves_all": everywhere[config] <= SAME, "today_worst": today if math.isfinite(today) else None,
            })  # fmt: skip
    return found


# -- the file


def versions() -> Row:
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "topmass": topmass.__version__,
    }


def where() -> Row:
    """Device and versions: what has to be the same for times to stand beside each other."""
    if DEVICE == "cpu":
        return {"device": "cpu", "arch": "interpreter", "versions": versions()}
    major, minor = torch.cuda.get_device_capability()
    return {"device": torch.cuda.get_device_name(), "arch": f"sm_{major}{minor}", "versions": versions()}


def stored(path: Path, here: Row) -> dict[str, Row]:
    """Finished cases of an earlier call at the same place, by what they are."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    if any(before.get(name) != value for name, value in here.items()):
        print(f"{path} is of another device or other versions and is replaced.", flush=True)
        return {}
    return {identity(r): r for r in before["cases"] if all(row["status"] != "not reached" for row in r["entries"])}


def identity(record: Row) -> str:
    return json.dumps([record["op"], record["case"], record["today"], [row["config"] for row in record["entries"]]])


def write(path: Path, here: Row, records: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = here | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tables": tables(records),
        "cases": records,
    }
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def sweep(args: argparse.Namespace, pool: Pool | None) -> None:
    """Work through the list until the time is up."""
    clock, here = Clock(args.seconds), where()
    room = ROOM if DEVICE == "cpu" else torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    before, records, todo = stored(args.out, here), [], []
    for case in plan(args.small):
        if args.only not in f"{case.op} {case.name}":
            continue
        configs = case.candidates(room)
        empty = {"op": case.op, "case": asdict(case), "today": configs[0], "entries": [{"config": c} for c in configs]}
        if kept := before.get(identity(empty)):
            records.append(kept)
            continue
        todo.append((case, [(c, pool and pool.apply_async(compile_one, (case, c))) for c in configs]))
    print(
        here["device"],
        *(f"{n} {v}" for n, v in here["versions"].items()),
        f"{len(records)} cases kept, {len(todo)} to do",
        flush=True,
    )
    for number, (case, jobs) in enumerate(todo):
        if clock.left <= 0:
            print("left out:", *(f"\n  {case.op}  {case.name}" for case, _ in todo[number:]), flush=True)
            break
        record = measure_or_say(case, jobs, clock)
        if record:
            records.append(record)
            print(f"{clock.spent:6.1f} s  ", "\n  ".join(describe(record)), sep="", flush=True)
            write(args.out, here, records)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    write(args.out, here, records)
    for table in tables(records):
        note = "" if table["one_entry_serves_all"] else "  no one entry serves all"
        print(
            f"{table['key']:36s} {table['config']}  worst {table['worst']:.3f}, today's {table['today_worst'] or math.nan:.3f}{note}",
            flush=True,
        )


def measure_or_say(case: Case, jobs: list[tuple[Config, AsyncResult[Row] | None]], clock: Clock) -> Row | None:
    try:
        return conclude(case, measure(case, jobs, clock))
    except Exception as error:  # the other cases may run
        print(f"FAILED {case.op}  {case.name}: {reason(error)}", flush=True)
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; finished cases in it are kept")
    parser.add_argument("--seconds", type=float, default=110.0, help="after which no new case begins")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--only", default="", help="only cases whose op and name contain this, such as 'x 256'")
    parser.add_argument("--small", action="store_true", help="tiny cases in Triton's interpreter, to try it on a CPU")
    args = parser.parse_args(arguments)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        parser.error("There is no GPU here: choose --small, or a machine with one.")
    if args.small or args.workers < 1:
        sweep(args, None)
        return 0
    with get_context("spawn").Pool(args.workers, only_compile, (torch.cuda.get_device_capability(),)) as pool:
        sweep(args, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
