"""The audit against quantities computed from the model's own attention."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import topmass
from topmass.errors import ConfigError, DataError
from topmass.eval import audit as module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 48, (2, 150), generator=torch.Generator().manual_seed(1))


def test_retained_mass_and_kl_come_from_the_models_attention(model, ids) -> None:
    result = topmass.audit(model, ids[:1], budgets=(12,), forwards=False)

    with torch.no_grad():
        attentions = model(ids[:1], output_attentions=True).attentions
    for layer, p in enumerate(attentions):
        mass = p[0].mean(0)
        kept = torch.zeros_like(mass, dtype=torch.bool)
        for t in range(150):
            kept[t, t] = True
            best = mass[t, :t].argsort(descending=True, stable=True)[: 11 if t + 1 > 12 else None]
            kept[t, best] = True
        retained = (p[0] * kept).sum(-1)
        config = "oracle b=12 q1 k1 layer"
        assert result.mean("retained_mass_mean", layer=layer, config=config) == pytest.approx(retained.mean().item())
        assert result.mean("kl_head_mean", layer=layer, config=config) == pytest.approx(-retained.log().mean().item())
        assert result.mean("keys_read_mean", layer=layer, config=config) == pytest.approx(kept.sum(-1).double().mean())


def test_a_plan_is_the_smallest_budget_that_retains_the_mass(model, ids) -> None:
    plan = topmass.audit(model, ids[:1], budgets=(12,), forwards=False).plan(0.9)
    for layer in (0, 1):
        budget = plan.budget(layer).tokens
        around = topmass.audit(model, ids[:1], budgets=(budget - 1, budget), forwards=False)
        kept = [
            around.mean("retained_mass_mean", layer=layer, config=f"oracle b={b} q1 k1 layer")
            for b in (budget - 1, budget)
        ]
        assert kept[0] < 0.9 <= kept[1]


def test_chunks_of_a_long_text_change_nothing(model, ids, monkeypatch) -> None:
    granularities = (topmass.Granularity(), topmass.Granularity(q_block=128, kv_block=2))
    whole = topmass.audit(model, ids[:1], budgets=(140, 12), granularities=granularities).to_records()
    monkeypatch.setattr(module, "CHUNK", 64)

    chunked = topmass.audit(model, ids[:1], budgets=(140, 12), granularities=granularities).to_records()

    assert [{**r, "value": None} for r in chunked] == [{**r, "value": None} for r in whole]
    for a, b in zip(chunked, whole, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-6, abs=1e-6), a["metric"]


def test_a_budget_over_the_length_costs_nothing(model, ids) -> None:
    result = topmass.audit(model, ids, budgets=(200,))
    config = "oracle b=200 q1 k1 layer"
    assert result.mean("logit_kl", config=config) == pytest.approx(0, abs=1e-6)
    assert result.mean("top1_agreement", config=config) == 1.0
    assert {r["text"] for r in result.records} == {0, 1}


def test_errors_name_the_remedy(model, ids) -> None:
    with pytest.raises(DataError, match="a text is empty"):
        topmass.audit(model, ids[:, :0])
    with pytest.raises(ConfigError, match="smallest that works is 16"):
        topmass.audit(model, ids, budgets=(4,), granularities=(topmass.Granularity(kv_block=8),))
    with pytest.raises(ConfigError, match="beyond the model's 512 positions"):
        topmass.audit(model, ids.repeat(1, 4))
    with pytest.raises(ConfigError, match=r"choose one of 0\.9, 0\.95, 0\.99"):
        topmass.audit(model, ids[:1], forwards=False).plan(0.5)
