"""`topmass bench serve` on the CPU engine: every mode answers, the cache is seen, and the floor computes no attention."""

import sys

from vllm_tiny import make

from topmass.bench.serve import ServeSetting, bench_serve
from topmass.bench.serve_engines import Launch
from topmass.report.serve import ServeTable
from topmass.results import LoadedRun
from topmass.results.schema import check_rows

ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 64}


def test_three_modes_answer_the_same_requests(tmp_path):
    model = make(tmp_path, "qwen3")
    launch = Launch(
        model=str(model.path), vocabulary=97, indexer=str(model.indexer), python=sys.executable, options=ENGINE
    )
    setting = ServeSetting(
        lengths=(257,), rates=(0.0, 5.0), requests=3, new_tokens=4, shared=0.5, sparse={"budget": 48}
    )
    rows = check_rows("serve", bench_serve(launch, setting))
    manifest = {"started": "2026", "kind": "serve", "device": "cpu", "config": {}, "model": "m"}
    table = ServeTable([LoadedRun(path=tmp_path, manifest=manifest, records=rows)])
    assert [(c.length, c.rate) for c in table.cases] == [(257, 0.0), (257, 5.0)]
    for case in table.cases:
        assert case.modes == ["dense", "sparse", "floor"]
        for mode in case.modes:
            assert len(case.values(mode, "ttft")) == len(case.values(mode, "tpot")) == 3
            assert min(case.values(mode, "ttft")) > 0
            # 128 common tokens are four pages, for all but the first
            assert case.total(mode, "prefix_hits") >= 2 * 128 / (3 * 257) * (case.rate == 0.0)
            assert 0 < case.total(mode, "kv_usage") < 1
    one = table.cases[0]
    # of 72 columns of a row, 8 are an index key's
    assert one.total("sparse", "kv_memory") == one.total("dense", "kv_memory") * 72 / 64


def test_the_floor_copies_the_values_of_a_prompt(engine, tmp_path):
    model = make(tmp_path, "qwen3")
    floor = engine(model, additional_config={"topmass_floor": True})
    layer = next(iter(floor.layers.values()))
    original, seen = layer.impl.forward, []

    def watch(layer, query, key, value, cache, metadata, **kwargs):
        out = original(layer, query, key, value, cache, metadata, **kwargs)
        if metadata is not None and metadata.max_query_len > 1:
            seen.append(bool((kwargs["output"].view_as(query)[:, ::2] == value.view(len(value), -1, 32)).all()))
        return out

    layer.impl.forward = watch
    tokens = floor.run([5] * 40, tokens=3)
    assert len(tokens[0]) == 3
    assert seen == [True]
