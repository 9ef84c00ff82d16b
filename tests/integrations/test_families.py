"""Every family: a budget of the length is the dense model; smaller ones are the independent oracle and the model's own eager attention."""

import itertools
import sys
from contextlib import contextmanager

import oracle64
import pytest
import tiny_models
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import topmass
from topmass.core.granularity import Granularity

pytestmark = pytest.mark.usefixtures("float64_throughout")
N = 61


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, tiny_models.build(family))


def full_layers(model) -> list[int]:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


@contextmanager
def attention(model, function, mask_function):
    """`function` as the attention of every softmax layer of `model`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("of_the_test", function)
    ALL_MASK_ATTENTION_FUNCTIONS.register("of_the_test", mask_function)
    config._attn_implementation = "of_the_test"
    try:
        yield
    finally:
        config._attn_implementation = before
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping["of_the_test"]
        del type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping["of_the_test"]


def logits_of_oracle(model, ids, rule):
    """The model with the independent oracle as its attention, and the keys each query read, by layer."""
    full, masks = full_layers(model), {}

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
        if module.layer_idx not in full:
            sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return sdpa(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        masks[module.layer_idx] = oracle64.support(q, k, rule, scale=scaling, softcap=softcap)
        return oracle64.attend(q, k, v, masks[module.layer_idx], scale=scaling, softcap=softcap), None

    with attention(model, attend, sdpa_mask):
        logits = model(ids).logits
    assert sorted(masks) == full
    return logits, masks


def logits_of_eager(model, ids, masks):
    """The model's own eager attention, with `masks` added to the logits of the full-attention layers."""
    seen = []

    def attend(module, query, key, value, mask, **kwargs):
        if module.layer_idx in masks:
            seen.append(module.layer_idx)
            keep = masks[module.layer_idx].repeat_interleave(query.shape[1] // masks[module.layer_idx].shape[1], 1)
            mask = torch.zeros(keep.shape, dtype=query.dtype).masked_fill(~keep, torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, **kwargs)

    with attention(model, attend, eager_mask):
        logits = model(ids).logits
    assert seen == sorted(masks)
    return logits


def selector_of(rule: oracle64.Rule) -> topmass.OracleSelector:
    return topmass.OracleSelector(
        budget=rule.budget,
        granularity=Granularity(q_block=rule.q_block, kv_block=rule.kv_block, share=rule.share),
        sink=rule.sink,
        window=rule.window,
        pool=rule.pool,
        dense_below=rule.dense_below,
    )


def check(model, rule: oracle64.Rule, *, batch=1):
    ids = tiny_models.prompt(N, batch=batch)
    with topmass.sparsify(model, selector_of(rule), record_support=True) as run:
        logits = model(ids).logits
    masks = {layer: support.mask(N) for layer, support in run.supports.items()}
    assert sorted(masks) == full_layers(model)

    expected, reads = logits_of_oracle(model, ids, rule)
    for layer, mask in masks.items():
        assert mask.repeat_interleave(reads[layer].shape[1] // mask.shape[1], 1).equal(reads[layer]), layer
        assert not mask.all()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, logits_of_eager(model, ids, masks), rtol=1e-9, atol=1e-9)


def rule_of(g, r, share, pool, *, more=0, **fields) -> oracle64.Rule:
    fields = {"q_block": g, "kv_block": r, "share": share, "pool": pool, **fields}
    return oracle64.Rule(budget=oracle64.Rule(budget=1, **fields).smallest_budget() + more, **fields)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("granularity", [Granularity(), Granularity(q_block=8, kv_block=4, share="q_head")], ids=str)
def test_a_budget_of_the_length_is_the_dense_model(models, family, granularity):
    model, ids = models(family), tiny_models.prompt(N, batch=2)
    dense = model(ids).logits
    for budget in (N, 4 * N, "100%"):
        for record in (False, True):  # dense attention, and attention over a support of everything
            selector = topmass.OracleSelector(budget=budget, granularity=granularity)
            with topmass.sparsify(model, selector, record_support=record):
                torch.testing.assert_close(model(ids).logits, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    "rule",
    [
        rule_of(1, 1, "layer", "sum", more=5),
        rule_of(4, 2, "layer", "max", more=3, sink=3),
        rule_of(1, 8, "kv_head", "sum", more=9, window=3),
        rule_of(16, 1, "q_head", "max", more=4, sink=1, window=2),
        oracle64.Rule(budget="20%", kv_block=2, share="q_head", sink=2, window=4),
        oracle64.Rule(budget="mass:0.7<=24", q_block=2, share="kv_head"),
        oracle64.Rule(budget=6, window=0, dense_below=25),
    ],
    ids=str,
)
def test_is_the_oracle_and_the_eager_model(models, family, rule):
    check(models(family), rule)


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("share", ["layer", "kv_head", "q_head"])
@pytest.mark.parametrize(("g", "r"), list(itertools.product((1, 2, 4, 8, 16), repeat=2)))
def test_every_granularity_share_and_pool(models, g, r, share, pool):
    check(models("qwen3"), rule_of(g, r, share, pool, more=(3 * g + r) % 7))


def test_a_batch(models):
    check(models("llama"), rule_of(2, 2, "layer", "sum", more=4), batch=2)
    check(models("qwen3_5"), rule_of(1, 1, "layer", "sum", more=4), batch=2)
