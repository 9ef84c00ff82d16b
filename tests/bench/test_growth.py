"""Union growth of a model's own selections."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import topmass
from topmass.bench.growth import model_growth
from topmass.results.schema import check_rows

LENGTH = 96


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def test_growth_of_every_layer_is_that_of_its_recorded_selections(model: LlamaForCausalLM) -> None:
    selector = topmass.OracleSelector(budget=12)

    rows = model_growth(model, prompt, selector, name="tiny", lengths=[64, LENGTH])

    assert check_rows("bench", rows) == rows
    assert [(r["length"], r["name"]) for r in rows] == [(n, f"layer {i}") for n in (64, LENGTH) for i in (0, 1)]
    assert {(r["q_heads"], r["kv_heads"], r["head_dim"], r["what"]) for r in rows} == {(4, 2, 8, "growth")}
    with torch.inference_mode(), topmass.sparsify(model, selector, record_support=True) as run:
        model(prompt(1, LENGTH))
    support = run.supports[1]
    chosen = [set(support.groups[0, 0, t, : int(support.counts[0, 0, t])].tolist()) for t in range(LENGTH)]
    tiles = [chosen[t : t + 32] for t in range(32, LENGTH, 32)]
    union = sum(len(set.union(*tile)) for tile in tiles)
    mean = sum(len(one) for tile in tiles for one in tile) / 32
    assert rows[-1]["value"] == pytest.approx(union / mean)
