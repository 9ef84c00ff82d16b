"""Synthetic runs: no model, but numbers that behave like a real one's."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from topmass.results import LoadedRun, Run, load_run, make_manifest

TASKS = {"needle": 4, "many_needles": 40, "variables": 60, "common_words": 200}
BUDGETS = (32, 64, 128, 256, 512, 1024)


def setting(selector: str, budget: int | None, q: int = 1, k: int = 1) -> dict:
    return {
        "selector": selector,
        "budget": None if budget is None else str(budget),
        "q_block": q,
        "kv_block": k,
        "share": "layer",
        "pool": "sum",
        "sink": 0,
        "window": 1,
    }


def settings() -> list[dict]:
    found = [setting("dense", None), *(setting("oracle", b) for b in BUDGETS)]
    found += [setting("oracle", b, q=q) for b in BUDGETS for q in (8, 32, 64)]
    found += [setting("oracle", b, k=k) for b in BUDGETS for k in (4, 16, 64)]
    return found + [setting(s, b) for b in BUDGETS for s in ("pooled", "previous_layer", "streaming", "random")]


HARDNESS = {"oracle": 1.0, "pooled": 4.0, "previous_layer": 2.5, "streaming": 30.0, "random": 60.0}


def eval_rows(lengths=(4096, 8192, 16384), haystacks: int = 20, kinds=None, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        for task, need in TASKS.items():
            hard = rng.random((haystacks, 2))
            for s in kinds or settings():
                rows += _cell(length, task, need, s, hard)
    return rows


def _cell(length: int, task: str, need: int, s: dict, hard: np.ndarray) -> list[dict]:
    budget = None if s["budget"] is None else int(s["budget"])
    infeasible = budget is not None and budget < s["q_block"] + 2 * s["kv_block"]
    factor = HARDNESS.get(s["selector"], 1.0) * s["q_block"] ** 0.35 * s["kv_block"] ** 0.3
    p = 0.97 if budget is None else 0.97 / (1 + (need * factor / budget) ** 3)
    common = s | {
        "task": task,
        "length": length,
        "seed": 0,
        "config": f"{s['selector']} b={s['budget']} q{s['q_block']} k{s['kv_block']} layer",
        "dense_below": 0,
        "decode": "dense",
        "fingerprint": "0" * 12,
        "status": "infeasible" if infeasible else "ok",
        "prediction": None if infeasible else "7",
        "references": json.dumps(["7"]),
        "prompt_tokens": length,
        "keys_read_mean": None if infeasible else (length / 2 if budget is None else budget * 0.97),
        "seconds": 0.1,
        "support_recall": None,
    }
    score = np.where(hard < p, 1.0, 0.0)
    return [
        common | {"haystack": h, "question_id": q, "score": None if infeasible else float(score[h, q])}
        for h, q in np.ndindex(hard.shape)
    ]


def audit_rows(texts: int = 3, length: int = 4096, layers=(3, 7)) -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for text in range(texts):
        for s in [x for x in settings() if x["selector"] == "oracle"]:
            for layer in (*layers, -1):
                rows += _audit_cell(text, layer, length, s, rng.normal(0, 0.01))
        for layer in layers:
            for mass in (0.9, 0.95, 0.99):
                value = round(60 * layer / (1.001 - mass) ** 0.5) + text
                rows.append(
                    _audit_row(text, layer, length, setting("oracle", None), f"plan_budget@{mass}", value, "tokens")
                )
    return rows


def _audit_cell(text: int, layer: int, length: int, s: dict, noise: float) -> list[dict]:
    reach = int(s["budget"]) / (40 * (abs(layer) + 1) * s["q_block"] ** 0.3 * s["kv_block"] ** 0.3)
    mass = min(1.0, max(0.0, 1 - math.exp(-reach) + noise * 0.1))
    values = {"logit_kl": (-math.log(mass + 1e-3) * 0.1 + 1e-4, "nats"), "top1_agreement": (mass**0.3, "fraction")}
    if layer >= 0:
        values |= {"retained_mass_mean": (mass, "fraction"), "keys_read_mean": (int(s["budget"]) * 0.97, "keys/query")}
        values |= {f"union_growth_{n}": (n ** (0.1 + 0.02 * layer), "ratio") for n in (2, 4, 8, 16, 32, 64)}
    else:
        values |= {"ppl_change": (0.5 * (1 - mass), "ratio")}
    return [_audit_row(text, layer, length, s, name, float(v), unit) for name, (v, unit) in values.items()]


def _audit_row(text: int, layer: int, length: int, s: dict, metric: str, value: float, unit: str) -> dict:
    return s | {"text": text, "layer": layer, "q_len": length, "metric": metric, "value": float(value), "unit": unit}


def write_run(base: Path, kind: str, rows: list[dict], name: str | None = None, **changes) -> LoadedRun:
    """Write a complete run and load it."""
    manifest = make_manifest(
        kind, {"n": 20}, model="reference", weights_hash="abc", command=f"topmass {kind} reference"
    )
    key = {"eval": ("task", "length", "config"), "audit": ("text",)}[kind]
    with Run.open(base / (name or kind), manifest | changes, key=key) as run:
        run.append(rows)
        return load_run(run.finish())


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., LoadedRun]:
    """`write_run` into a directory of the test."""
    return functools.partial(write_run, tmp_path / "runs")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one evaluation and one audit, for tests that only read it."""
    base = tmp_path_factory.mktemp("runs")
    write_run(base, "eval", eval_rows(lengths=(4096, 16384), haystacks=4))
    return write_run(base, "audit", audit_rows(texts=2)).path.parent


@pytest.fixture(name="eval_rows")
def _eval_rows() -> Callable[..., list[dict]]:
    return eval_rows


@pytest.fixture(name="audit_rows")
def _audit_rows() -> Callable[..., list[dict]]:
    return audit_rows


@pytest.fixture(name="setting")
def _setting() -> Callable[..., dict]:
    return setting
