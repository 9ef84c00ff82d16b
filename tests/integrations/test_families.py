"""Every family: a budget of the length is the dense model; smaller ones are the independent oracle and the model's own eager attention."""

import itertools
import sys
from contextlib import contextmanager

import oracle64
import pytest
import tiny_models
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import topmass
from topmass.core.granularity import Granularity
from topmass.errors import UnsupportedModelError
from topmass.integrations.transformers._session import Session
from topmass.integrations.transformers.families import family_of, find_layers, list_families, list_refused
from topmass.integrations.transformers.index_features import describe_model, index_configs, index_features
from topmass.ops.dense_prefill import dense_prefill
from topmass.selection.indexer import Indexer, index_rope

pytestmark = pytest.mark.usefixtures("float64_throughout")
N = 61


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # threads cost more than they bring at this size
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, tiny_models.build(family))


def full_layers(model) -> list[int]:
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind in ("full_attention", "hybrid")]


def layer_of(model):
    """Finds the layer of an attention module."""
    decoder = next(m for m in model.modules() if hasattr(m, "layers"))
    layers = {id(m): i for i, layer in enumerate(decoder.layers) for m in layer.modules()}
    return lambda module: layers[id(module)]


def eager_attention(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


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
    full, masks, layer_at = full_layers(model), {}, layer_of(model)

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        layer = layer_at(module)
        if layer not in full:
            kwargs |= {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
            return eager_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        extra = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        masks[layer] = oracle64.support(q, k, rule, **extra)
        return oracle64.attend(q, k, v, masks[layer], **extra), None

    with attention(model, attend, eager_mask):
        logits = model(ids).logits
    assert sorted(masks) == full
    return logits, masks


def logits_of_eager(model, ids, masks, **more):
    """The model's own eager attention, with `masks` added to the logits of the full-attention layers."""
    seen, layer_at = [], layer_of(model)

    def attend(module, query, key, value, attention_mask, **kwargs):
        layer = layer_at(module)
        if layer in masks:
            seen.append(layer)
            keep = masks[layer].repeat_interleave(query.shape[1] // masks[layer].shape[1], 1)
            attention_mask = torch.zeros(keep.shape, dtype=query.dtype)
            attention_mask.masked_fill_(~keep, torch.finfo(query.dtype).min)
        return eager_attention(module, query, key, value, attention_mask, **kwargs)

    with attention(model, attend, eager_mask):
        logits = model(ids, **more).logits
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


def check(model, rule: oracle64.Rule, *, batch=1, n=N):
    ids = tiny_models.prompt(n, batch=batch)
    with topmass.sparsify(model, selector_of(rule), record_support=True) as run:
        logits = model(ids).logits
    masks = {layer: support.mask(n) for layer, support in run.supports.items()}
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


# every family there is, in fewer tests

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHORT = 37
EVERY = tuple(name for name in tiny_models.EVERY if name not in tiny_models.FAMILIES)


def indexed(model, budget, *, sink=0, window=1, **settings):
    """A selector of an untrained indexer."""
    indexer = Indexer.create(index_configs(model, dim=6, **settings), describe_model(model)[0], seed=1).double()
    granularity = Granularity(kv_block=indexer.info.kv_block)
    return indexer.selector(budget=budget, granularity=granularity, sink=sink, window=window)


def in_chunks(model, ids, step):
    parts, cache = [], None
    for lo in range(0, ids.shape[1], step):
        out = model(ids[:, lo : lo + step], past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    return torch.cat(parts, 1)


class Watch:
    """Dense attention that keeps its calls."""

    def __init__(self):
        self.calls = {}

    def begin_forward(self):
        pass

    def __call__(self, call):
        self.calls[call.layer] = call
        return dense_prefill(call.q, call.k, call.v, scale=call.scale, softcap=call.softcap, sinks=call.sinks)


def selectors(model):
    """One of each kind, with small budgets."""
    yield topmass.OracleSelector(budget=9, sink=2, window=3)
    yield indexed(model, 9, sink=2, window=3)
    yield indexed(model, "mass:0.6<=20", kv_block=4, features="qk")


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_dense_at_a_budget_of_the_length(models, family):
    model, ids = models(family), tiny_models.prompt(SHORT)
    dense = model(ids).logits
    for selector in (topmass.OracleSelector(budget=SHORT), indexed(model, SHORT)):
        for record in (False, True):
            with topmass.sparsify(model, selector, record_support=record) as run:
                torch.testing.assert_close(model(ids).logits, dense, **EXACT)
            assert {r.mode for r in run.receipt.layers.values()} == {"dense"}
    assert dense.std() > 0.1


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_the_oracle_and_the_eager_model(models, family):
    check(models(family), oracle64.Rule(budget=11, kv_block=2, share="kv_head", sink=2, window=2), n=SHORT)


@pytest.mark.parametrize("family", EVERY)
def test_every_familys_chunks_equal_one_shot(models, family):
    model, ids = models(family), tiny_models.prompt(SHORT)
    if not family_of(find_layers(model)[0]).resumes:
        # it is the model's own doing
        assert (in_chunks(model, ids, 16) - model(ids, use_cache=False).logits).abs().max() > 1e-3
        with (
            topmass.sparsify(model, topmass.OracleSelector(budget=9)),
            pytest.raises(UnsupportedModelError, match="whole prompt in one call"),
        ):
            in_chunks(model, ids, 16)
        return
    for selector in selectors(model):
        with topmass.sparsify(model, selector, decode="sparse") as run:
            whole = model(ids, use_cache=False).logits
            parts = in_chunks(model, ids, 16)
        torch.testing.assert_close(parts, whole, **EXACT)
        assert {r.mode for r in run.receipt.layers.values()} == {"sparse"}


@pytest.mark.parametrize("family", EVERY)
def test_every_family_generates(models, family):
    model, ids = models(family), tiny_models.prompt(20)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    for selector in (topmass.OracleSelector(budget=30), indexed(model, 30)):
        with topmass.sparsify(model, selector):
            assert model.generate(ids, **settings).equal(expected)
    with topmass.sparsify(model, indexed(model, 9)) as run:
        assert model.generate(ids, **settings).shape == (1, 23)
    for receipt in run.receipt.layers.values():
        assert (receipt.sparse_queries, receipt.decode_queries) == (11, 2)


@pytest.fixture
def before_rope(monkeypatch):
    """What each full-attention layer of a model gives to the model's own RoPE, queries and keys with the heads second."""

    def watch(model):
        turned, running = {}, []
        _, layers = find_layers(model)
        for i, module in layers.items():
            module.register_forward_pre_hook(lambda *_, i=i: running.append(i))
            module.register_forward_hook(lambda *_: running.clear())
        source = sys.modules[type(module).__module__]
        for name in ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb", "apply_rotary_emb"):
            if own := getattr(source, name, None):

                def turn(q, k, *args, own=own, **kwargs):
                    turned.update(dict.fromkeys(running, (q, k)))
                    return own(q, k, *args, **kwargs)

                monkeypatch.setattr(source, name, turn)
        return turned

    return watch


@pytest.mark.parametrize("family", tiny_models.EVERY)
def test_a_model_is_described_as_it_runs(family, before_rope):
    model, watch = tiny_models.build(family), Watch()
    turned = before_rope(model)
    with Session(model, watch, capture=True):
        model(tiny_models.prompt(7), use_cache=False)

    fingerprint, rope = describe_model(model)
    assert tuple(sorted(watch.calls)) == fingerprint.full_layers == tuple(rope)
    for layer, call in watch.calls.items():
        inputs, width = call.inputs, rope[layer].rotary_dim
        assert inputs.hidden.shape == (1, 7, fingerprint.hidden_size)
        assert call.q.shape[2:] == (fingerprint.q_heads, fingerprint.head_dim)
        assert call.k.shape[2:] == (fingerprint.kv_heads, fingerprint.head_dim)
        features = index_features("qk", inputs, call.q, call.k)
        if not width:
            assert inputs.cos is inputs.sin is None
            assert layer not in turned
            assert features[0].equal(call.q.flatten(2))
            continue
        assert inputs.cos.shape == (1, 7, width)
        for given, expected in zip(index_rope(inputs.cos, inputs.sin, width), (inputs.cos, inputs.sin), strict=True):
            assert given.equal(expected)
        # what is projected for the index is what the model had before its own RoPE
        for mine, own in zip(features, turned[layer], strict=True):
            mine = mine.unflatten(-1, (-1, fingerprint.head_dim)).transpose(1, 2)[..., : own.shape[-1]]
            torch.testing.assert_close(mine, own, **EXACT)


# images and films

PICTURES = [(family, video) for family in tiny_models.VISUAL for video in (False, True)]


@pytest.mark.parametrize(("family", "video"), PICTURES)
def test_images_and_films_go_through_the_sparse_prefill(models, family, video):
    model = models(family)
    ids, more = tiny_models.images(model, 24, video=video)
    n, dense = ids.shape[1], model(ids, **more).logits
    blind = model(ids, **{name: x * 1.5 if x.is_floating_point() else x for name, x in more.items()}).logits
    assert (blind - dense).abs().max() > 1e-3
    for selector in (topmass.OracleSelector(budget=n), indexed(model, n)):
        with topmass.sparsify(model, selector, record_support=True):
            torch.testing.assert_close(model(ids, **more).logits, dense, **EXACT)

    with topmass.sparsify(model, topmass.OracleSelector(budget=9, sink=2), record_support=True) as run:
        sparse = model(ids, **more).logits
    masks = {layer: support.mask(n) for layer, support in run.supports.items()}
    torch.testing.assert_close(sparse, logits_of_eager(model, ids, masks, **more), **EXACT)
    with topmass.sparsify(model, indexed(model, 9)) as run:
        generated = model.generate(ids, **more, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, n + 3)
    assert {r.sparse_queries for r in run.receipt.layers.values()} == {n - 9}


@pytest.mark.parametrize("family", tiny_models.VISUAL)
def test_an_index_turns_with_the_positions_of_an_image(family, before_rope):
    model, watch = tiny_models.build(family), Watch()
    turned, (ids, more) = before_rope(model), tiny_models.images(model, 9)
    with Session(model, watch, capture=True):
        model(ids, **more, use_cache=False)
    tokens = int(more["mm_token_type_ids"].sum())
    for layer, call in watch.calls.items():
        first = int(more["mm_token_type_ids"][0].nonzero()[0])
        image = call.inputs.cos[0, first : first + tokens]
        # height and width make positions of one moment differ, and never in all frequencies
        assert ((image[0] == image[1]).any() and (image[0] != image[1]).any()) or image.shape[-1] <= 2
        for mine, own in zip(index_features("qk", call.inputs, call.q, call.k), turned[layer], strict=True):
            mine = mine.unflatten(-1, (-1, call.q.shape[-1])).transpose(1, 2)[..., : own.shape[-1]]
            torch.testing.assert_close(mine, own, **EXACT)


@pytest.mark.parametrize("family", tiny_models.VISUAL)
def test_an_audit_of_a_prompt_with_an_image(models, family):
    model = models(family)
    ids, more = tiny_models.images(model, 24)
    result = topmass.audit(model, ids, budgets=(9, ids.shape[1]), inputs=more)
    whole, part = (f"oracle b={b} q1 k1 layer" for b in (ids.shape[1], 9))
    assert result.mean("logit_kl", config=whole) < 1e-12 < result.mean("logit_kl", config=part)
    with topmass.sparsify(model, topmass.OracleSelector(budget=9)):
        sparse = model(ids, **more).logits[0].log_softmax(-1)
    dense = model(ids, **more).logits[0].log_softmax(-1)
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean()
    torch.testing.assert_close(result.mean("logit_kl", config=part), float(expected), rtol=1e-6, atol=1e-9)


def gemma3_with_eyes():
    text = tiny_models.COMMON | tiny_models.SLIDING | {"query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=58)
    return Gemma3ForConditionalGeneration(config).double().eval().requires_grad_(False)


def test_image_tokens_that_see_each_other_are_refused_and_text_is_not():
    model, ids = gemma3_with_eyes(), tiny_models.prompt(30)
    dense = model(ids).logits
    with topmass.sparsify(model, topmass.OracleSelector(budget=9)) as run:
        model(ids)
    assert {r.mode for r in run.receipt.layers.values()} == {"sparse"}
    with topmass.sparsify(model, topmass.OracleSelector(budget=30)):
        torch.testing.assert_close(model(ids).logits, dense, **EXACT)

    ids[0, 5:9] = 58
    image = {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64), "token_type_ids": (ids == 58).long()}
    dense = model(ids, **image).logits
    with (
        topmass.sparsify(model, topmass.OracleSelector(budget=9)),
        pytest.raises(UnsupportedModelError, match="image tokens that see each other"),
    ):
        model(ids, **image)
    assert model(ids, **image).logits.equal(dense)


# what is refused


@pytest.mark.parametrize("kind", sorted(list_refused()))
def test_a_family_that_is_refused_says_why(kind):
    class Refused(PreTrainedModel):
        config_class = LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = torch.nn.Linear(2, 2)

    config = LlamaConfig(**tiny_models.COMMON)
    config.model_type = kind
    with pytest.raises(UnsupportedModelError) as error:
        find_layers(Refused(config))
    assert str(error.value).startswith(f"Models of type {kind!r} are not supported ({list_refused()[kind]});")
    assert "\n" not in str(error.value)


def test_no_family_is_both_known_and_refused():
    assert not set(list_families()) & set(list_refused())
    types = {tiny_models.config_of(name).get_text_config().model_type for name in tiny_models.EVERY}
    assert types == set(list_families())
