"""Support recall against loops over sets."""

import oracle64
import pytest
import torch
from tiny_models import build, prompt

import topmass
from topmass.core.granularity import Granularity
from topmass.eval.recall import RecallMeter, support_quality
from topmass.eval.settings import columns, indexer_grid
from topmass.ops import attention_mass


def inputs(n=70):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(1, n, 4, 6, generator=gen).double(), torch.randn(1, n, 2, 6, generator=gen).double()


@pytest.mark.parametrize(("q_block", "kv_block", "share"), [(1, 1, "layer"), (4, 2, "layer"), (1, 4, "kv_head")])
def test_recall_and_mass_of_a_support(q_block: int, kv_block: int, share) -> None:
    q, k = inputs()
    granularity = Granularity(q_block=q_block, kv_block=kv_block, share=share)
    from topmass.selection import AttentionInputs

    seen = AttentionInputs(q=q, k=k, scale=0.5)
    oracle = topmass.OracleSelector(budget=20, granularity=granularity)
    random = topmass.RandomSelector(budget=20, granularity=granularity)
    mass = attention_mass(q, k, scale=0.5, share=share)
    best = support_quality(oracle.select(seen), mass, rule=oracle.rule(0))
    assert bool((best.recall == 1).all())
    assert torch.equal(best.retained, best.attainable)
    support = random.select(seen)
    found = support_quality(support, mass, rule=random.rule(0))
    rows = support.sparse_rows().nonzero().flatten().tolist()
    p = oracle64.probabilities(q, k, scale=0.5, softcap=None, sinks=None)
    chosen, ideal = support.mask(70), oracle.select(seen).mask(70)
    for head in range(chosen.shape[1]):
        heads = p[0] if share == "layer" else p[0, 2 * head : 2 * head + 2]
        for i, t in enumerate(rows):
            a, b = (set(m[0, head, t].nonzero().flatten().tolist()) for m in (chosen, ideal))
            assert found.recall[0, head, i].item() == pytest.approx(len(a & b) / len(b))
            assert found.retained[0, head, i].item() == pytest.approx(heads[:, t, sorted(a)].sum(-1).mean().item())


def test_meter_of_a_model() -> None:
    model = build("llama", dtype=torch.float32)
    recalls = {}
    for name, selector in {
        "oracle": topmass.OracleSelector(budget=16),
        "random": topmass.RandomSelector(budget=16),
        "streaming": topmass.StreamingSelector(sink=4, window=12),
        "dense": topmass.DenseSelector(),
    }.items():
        meter = RecallMeter()
        with topmass.sparsify(model, selector) as run:
            run.observe = meter
            model(prompt(150))
        recalls[name] = meter.recall
    assert recalls["oracle"] == 1.0
    assert 0 < recalls["random"] < 0.6
    assert 0 < recalls["streaming"] < 0.8
    assert recalls["dense"] is None


def test_indexer_grid_has_an_untrained_one_beside_it() -> None:
    from topmass.distill import DistillConfig, untrained

    indexer = untrained(build("llama"), DistillConfig(dim=8, kv_block=2, seed=3))
    indexer.info = indexer.info.replace(training_tokens=1000)
    grid = indexer_grid(indexer, [8, 32], q_blocks=[1, 16])
    found = [(c["selector"], c["budget"], c["q_block"], c["kv_block"]) for c in map(columns, grid.values())]
    assert found == [
        ("indexer", "8", 1, 2), ("indexer", "8", 16, 2), ("untrained", "8", 1, 2),
        ("indexer", "32", 1, 2), ("indexer", "32", 16, 2), ("untrained", "32", 1, 2),
    ]  # fmt: skip
    assert type(grid["indexer b=8 q16 k2 layer"]).__name__ == "Infeasible"
