"""An indexer inside transformers models: what it reads, what the cache keeps, and that nothing depends on chunks."""

import copy
import gc
import weakref

import pytest
import tiny_models
import torch
from transformers import DynamicCache

import topmass
from topmass.core.granularity import Granularity
from topmass.errors import ConfigError
from topmass.integrations.transformers import index_keys
from topmass.integrations.transformers._session import Session
from topmass.integrations.transformers.families import find_layers
from topmass.integrations.transformers.index_features import RopeInfo, describe_model, index_configs
from topmass.integrations.transformers.index_keys import IndexKeys
from topmass.ops import _logits
from topmass.selection.indexer import Indexer, index_rope

EXACT = {"rtol": 1e-9, "atol": 1e-9}
FAMILIES = ("qwen3_5", "qwen3_5_vl", "qwen3_next", "qwen3", "qwen2", "llama", "mistral", "gemma3")


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, tiny_models.build(family))


def make(model, *, seed=1, dim=6, **settings):
    """An untrained indexer whose norms are not all ones, which would hide where they belong."""
    indexer = Indexer.create(index_configs(model, dim=dim, **settings), describe_model(model)[0], seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in indexer.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    return indexer


def select(indexer, budget=9, **settings):
    q_block = settings.pop("q_block", 1)
    granularity = Granularity(q_block=q_block, kv_block=indexer.info.kv_block)
    return indexer.selector(budget=budget, granularity=granularity, **settings)


def in_chunks(model, ids, step, cache=None, **kwargs):
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    parts = [
        model(ids[:, lo : lo + step], past_key_values=cache, **kwargs).logits for lo in range(0, ids.shape[1], step)
    ]
    return torch.cat(parts, 1)


# what is selected


def turned(x, position, theta, width, rotary):
    """RoPE of a vector at a position: pair i has one of the model's `width / 2` frequencies, evenly spaced."""
    out = x.clone()
    for i in range(rotary // 2):
        frequency = theta ** -(2 * (i * (width // 2) // (rotary // 2)) / width)
        # transformers keeps frequencies in float32
        angle = position * torch.tensor(frequency, dtype=torch.float32).double()
        j = i + rotary // 2
        out[i] = x[i] * angle.cos() - x[j] * angle.sin()
        out[j] = x[j] * angle.cos() + x[i] * angle.sin()
    return out


def normed(x, weight):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


@torch.no_grad()
def expected_keys(module, sources, budget, rope):
    """Keys read by every query, from the module's weights and loops."""
    config, (q_in, k_in) = module.config, sources
    r, dim, heads = config.kv_block, config.dim, config.heads
    n = len(q_in)
    w = module.q_proj.weight.view(heads, dim, -1)
    keys = []
    for j in range(n // r):
        raw = sum(module.k_proj.weight @ k_in[t] for t in range(j * r, (j + 1) * r)) / r
        keys.append(turned(normed(raw, module.k_norm.weight), j * r, *rope, config.rotary_dim))
    mask = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        q = [turned(normed(w[h] @ q_in[t], module.q_norm.weight), t, *rope, config.rotary_dim) for h in range(heads)]
        start = t // r * r  # window 1
        dots = [[float(x @ key) / dim**0.5 for x in q] for key in keys[: start // r]]
        scores = [d[0] if heads == 1 else sum(max(x, 0.0) for x in d) for d in dots]
        wanted = (budget - 1 - (r - 1)) // r
        best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:wanted]
        visible = range(t + 1) if t + 1 <= budget else [s for s in range(t + 1) if s >= start or s // r in best]
        mask[t, list(visible)] = True
    return mask


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"kv_block": 4, "heads": 2}, {"features": "qk", "dim": 12}])
def test_supports_are_those_of_loops_over_the_definition(models, family, settings):
    model, ids, n, budget = models(family), tiny_models.prompt(29), 29, 11
    indexer, seen, projected = make(model, **settings), {}, {}
    decoder, layers = find_layers(model)
    hooks = []
    for i, m in layers.items():
        hooks.append(
            m.register_forward_pre_hook(lambda m, a, k, i=i: seen.update({i: k["hidden_states"]}), with_kwargs=True)
        )
        for name in ("q", "k"):
            # a layer's own q and k before RoPE: what its norm gives, or its projection where there is none
            part = getattr(m, f"{name}_norm", None) or getattr(m, f"{name}_proj")
            hooks.append(part.register_forward_hook(lambda m, a, out, key=(name, i): projected.update({key: out})))
    with topmass.sparsify(model, select(indexer, budget), record_support=True) as run:
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    for i in layers:
        rope = decoder.config.rope_parameters
        rope = rope.get("full_attention", rope)
        width = int(8 * rope.get("partial_rotary_factor", 1.0))
        sources = [seen[i][0], seen[i][0]]
        if settings.get("features") == "qk":
            parts = [projected[name, i] for name in ("q", "k")]
            if family == "gemma3":  # heads first
                parts = [x.transpose(1, 2) for x in parts]
            sources = [x.reshape(n, -1) for x in parts]
        expected = expected_keys(indexer.layer(i), sources, budget, (rope["rope_theta"], width))
        assert run.supports[i].mask(n)[0, 0].equal(expected)
        assert not expected.equal(torch.ones(n, n).tril().bool())


def test_a_narrow_index_has_the_ropes_own_frequencies():
    position = torch.arange(50, dtype=torch.float64)[:, None]

    def table(width):
        angle = position * 1e4 ** -(torch.arange(0, width, 2) / width)
        return torch.cat([angle, angle], -1)[None]

    for rotary in (32, 16, 8, 2, 0):
        cos, sin = index_rope(table(32).cos(), table(32).sin(), rotary)
        torch.testing.assert_close(cos, table(rotary).cos() if rotary else cos)
        torch.testing.assert_close(sin, table(rotary).sin() if rotary else sin)
        assert cos.shape == (1, 50, rotary)
    # widths that do not divide still go from the fastest frequency on
    cos, _ = index_rope(table(32).cos(), table(32).sin(), 12)
    assert cos.shape[-1] == 12
    assert cos[..., 0].equal(table(32).cos()[..., 0])
    with pytest.raises(ConfigError, match="beyond the model's 32"):
        index_rope(table(32).cos(), table(32).sin(), 34)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_described_as_it_runs(models, family):
    model, seen = models(family), {}

    class Watch:
        def begin_forward(self):
            pass

        def __call__(self, call):
            seen[call.layer] = (call.inputs.hidden, call.inputs.cos, call.q, call.k)
            return call.q

    with Session(model, Watch(), capture=True):
        model(tiny_models.prompt(5))
    fingerprint, rope = describe_model(model)

    assert tuple(sorted(seen)) == fingerprint.full_layers == tuple(rope)
    for layer, (hidden, cos, q, k) in seen.items():
        assert cos.shape == (1, 5, rope[layer].rotary_dim)
        assert hidden.shape == (1, 5, fingerprint.hidden_size)
        assert q.shape[2:] == (fingerprint.q_heads, fingerprint.head_dim)
        assert k.shape[2] == fingerprint.kv_heads
    assert RopeInfo(rotary_dim=64).index_dim(17) == 16


# chunks, padding


def test_weights_are_sampled_again_where_they_changed(models):
    model = copy.deepcopy(models("qwen3"))
    sampled = [describe_model(model)[0].weights]
    assert describe_model(model)[0].weights == sampled[0] == describe_model(models("qwen3"))[0].weights
    attention = find_layers(model)[1][0]
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
    sampled.append(describe_model(model)[0].weights)
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight * 2)
    sampled.append(describe_model(model)[0].weights)
    attention.v_proj.weight.data = attention.v_proj.weight.data * 2
    sampled.append(describe_model(model)[0].weights)
    assert len(set(sampled)) == 4


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_all_keys_is_dense(models, family):
    model, ids = models(family), tiny_models.prompt(30)
    with topmass.sparsify(model, select(make(model), 30), record_support=True) as run:
        logits = model(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, **EXACT)
    assert run.receipt.layers[1].reason == "30 queries: within the budget"


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_one_shot(models, family):
    model, ids = models(family), tiny_models.prompt(70, batch=2)
    for settings, budget in (({}, 9), ({"kv_block": 4, "features": "qk"}, "mass:0.6<=20")):
        selector = select(make(model, **settings), budget, sink=2, window=3)
        with topmass.sparsify(model, selector, decode="sparse", record_support=True) as run:
            whole = model(ids, use_cache=False).logits
        for step, n in ((1, 14), (7, 70), (64, 70)):
            with topmass.sparsify(model, selector, decode="sparse", record_support=True) as chunked:
                parts = in_chunks(model, ids[:, :n], step)

            torch.testing.assert_close(parts, whole[:, :n], **EXACT)
            for layer, support in chunked.supports.items():
                assert support.mask(n).equal(run.supports[layer].mask(70)[:, :, :n, :n])
                assert not run.supports[layer].mask(70)[:, :, -1].all(-1).any()


@pytest.mark.usefixtures("float64_throughout")
def test_shared_blocks_reduce_as_trained(models):
    model, ids = models("llama"), tiny_models.prompt(60)
    found = {}
    for reduce in ("mean", "max"):
        selector = select(make(model, reduce=reduce), 20, q_block=8)
        for step in (16, 60):
            with topmass.sparsify(model, selector, record_support=True) as run:
                in_chunks(model, ids, step)
            found[reduce, step] = run.supports[0].mask(60)
        assert found[reduce, 16].equal(found[reduce, 60])
        assert selector.config()["reduce"] == reduce
    assert not found["mean", 60].equal(found["max", 60])


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("family", "step"), [("llama", 60), ("llama", 7), ("gemma3", 13), ("qwen3_5", 60)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_prompt_alone(models, family, side, step):
    model, lengths = models(family), (41, 60, 30)
    ids, mask = torch.zeros(3, 60, dtype=torch.long), torch.zeros(3, 60, dtype=torch.long)
    spans = [slice(60 - n, 60) if side == "left" else slice(0, n) for n in lengths]
    prompts = [tiny_models.prompt(n, seed=n) for n in lengths]
    for i, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        ids[i, span], mask[i, span] = prompt[0], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for settings in ({"kv_block": 4}, {"features": "qk"}):
        selector = select(make(model, **settings), 11)
        with topmass.sparsify(model, selector, decode="sparse", record_support=True) as run:
            cache, parts = DynamicCache(config=model.config), []
            for lo in range(0, 60, step):
                hi = min(lo + step, 60)
                options = {"attention_mask": mask[:, :hi], "position_ids": positions[:, lo:hi]}
                parts.append(model(ids[:, lo:hi], past_key_values=cache, **options).logits)
        batched = torch.cat(parts, 1)
        for i, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
            with topmass.sparsify(model, selector, record_support=True) as single:
                alone = model(prompt).logits
            torch.testing.assert_close(batched[i, span], alone[0], **EXACT)
            for layer, support in single.supports.items():
                assert run.supports[layer][i].mask(60).equal(support.mask(60))


# the cache


def rows_of(cache):
    return {i: x.index_rows for i, x in enumerate(cache.layers) if getattr(x, "index_rows", None) is not None}


def assert_same_rows(cache, other):
    mine, theirs = rows_of(cache), rows_of(other)
    assert mine.keys() == theirs.keys()
    assert mine
    for layer, rows in mine.items():
        for name in ("raw", "cos", "sin"):
            torch.testing.assert_close(getattr(rows, name), getattr(theirs[layer], name), **EXACT)
        assert len(rows) == cache.get_seq_length(layer)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("kept", [0, 1, 18, 20])
def test_a_cropped_cache_forgets(models, r, kept):
    model, ids, other = models("llama"), tiny_models.prompt(43, batch=2), tiny_models.prompt(15, batch=2, seed=5)
    selector, cache, fresh = select(make(model, kv_block=r), 11), DynamicCache(), DynamicCache()
    with topmass.sparsify(model, selector):
        model(ids, past_key_values=cache)
        cache.crop(kept - 43)
        found = model(other, past_key_values=cache).logits
        expected = model(torch.cat([ids[:, :kept], other], 1), past_key_values=fresh).logits[:, kept:]

    torch.testing.assert_close(found, expected, **EXACT)
    assert_same_rows(cache, fresh)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_a_cache_that_is_rearranged(models, family):
    # as an evaluation does: haystacks prefilled once, copied, and branched by question
    model, ids, question = models(family), tiny_models.prompt(37, batch=2), tiny_models.prompt(6, batch=4, seed=3)
    selector, config = select(make(model, kv_block=4), 11), model.config
    order = torch.tensor([1, 0, 0, 1])
    changes = {
        "reorder_cache": (lambda c: c.reorder_cache(order), order),
        "batch_select_indices": (lambda c: c.batch_select_indices(order), order),
        "batch_repeat_interleave": (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
    }
    if family == "qwen3_5":  # transformers' linear layers have no other way
        del changes["batch_select_indices"], changes["batch_repeat_interleave"]
    with topmass.sparsify(model, selector):
        cache = DynamicCache(config=config)
        model(ids, past_key_values=cache)
        for change, chosen in changes.values():
            branch, fresh = copy.deepcopy(cache), DynamicCache(config=config)
            change(branch)
            found = model(question, past_key_values=branch).logits
            expected = model(torch.cat([ids[chosen], question], 1), past_key_values=fresh).logits[:, 37:]

            torch.testing.assert_close(found, expected, **EXACT)
            assert_same_rows(branch, fresh)
        assert cache.get_seq_length(1) == 37


@pytest.mark.usefixtures("float64_throughout")
def test_two_caches_take_turns(models):
    model, selector = models("qwen3_5"), select(make(models("qwen3_5"), kv_block=4), 11)
    prompts = [tiny_models.prompt(40, seed=seed) for seed in (0, 1)]
    caches = [DynamicCache(config=model.config) for _ in prompts]
    with topmass.sparsify(model, selector, decode="sparse"):
        expected = [model(ids).logits for ids in prompts]
        parts = [[], []]
        for lo in range(0, 40, 7):
            for ids, cache, found in zip(prompts, caches, parts, strict=True):
                found.append(model(ids[:, lo : lo + 7], past_key_values=cache).logits)
    for found, logits in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), logits, **EXACT)


def test_a_reset_cache_begins_again(models):
    model, ids, cache, fresh = models("llama"), tiny_models.prompt(30), DynamicCache(), DynamicCache()
    with topmass.sparsify(model, select(make(model))):
        model(tiny_models.prompt(20, seed=4), past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this transformers keeps the length of a reset cache")
        model(ids, past_key_values=cache)
        model(ids, past_key_values=fresh)
    assert_same_rows(cache, fresh)


def test_the_block_may_end_between_chunks(models):
    model, ids, selector, cache = models("llama"), tiny_models.prompt(40), select(make(models("llama"))), DynamicCache()
    with topmass.sparsify(model, selector):
        expected = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
    branch = copy.deepcopy(cache)
    cache.crop(-3)
    with topmass.sparsify(model, selector):
        found = model(ids[:, 17:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 17:], **EXACT)
    # outside, the cache is an ordinary one
    plain = DynamicCache()
    model(ids[:, :20], past_key_values=plain)
    assert branch.layers[0].keys.shape == plain.layers[0].keys.shape
    model(ids[:, 20:], past_key_values=branch)
    with (
        topmass.sparsify(model, selector),
        pytest.raises(ConfigError, match="40 positions of layer 0, but index keys for 20"),
    ):
        model(ids[:, :5], past_key_values=branch)
    assert branch.get_seq_length() == 40


def test_a_cache_that_the_indexer_never_saw(models):
    model, ids, cache = models("llama"), tiny_models.prompt(30), DynamicCache()
    model(ids[:, :20], past_key_values=cache)
    with topmass.sparsify(model, select(make(model))), pytest.raises(ConfigError, match="begin the prompt"):
        model(ids[:, 20:], past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_a_cache_of_another_indexer(models):
    model, ids, cache = models("llama"), tiny_models.prompt(30), DynamicCache()
    with topmass.sparsify(model, select(make(model, seed=1))):
        model(ids[:, :20], past_key_values=cache)
    with topmass.sparsify(model, select(make(model, seed=2))), pytest.raises(ConfigError, match="another indexer"):
        model(ids[:, 20:], past_key_values=cache)
    with topmass.sparsify(model, select(make(model, seed=1), 7)):
        model(ids[:, 20:], past_key_values=cache)


# generation


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_generate_writes_keys_at_every_position(models, family, decode):
    model, ids, selector = models(family), tiny_models.prompt(20, batch=2), select(make(models(family), kv_block=4), 11)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 60}
    cache = DynamicCache(config=model.config)
    with topmass.sparsify(model, selector, decode=decode) as run:
        found = model.generate(ids, past_key_values=cache, **options)
        out = ids
        stepwise = DynamicCache(config=model.config)
        logits = model(out, past_key_values=stepwise).logits
        for _ in range(9):
            out = torch.cat([out, logits[:, -1:].argmax(-1)], 1)
            logits = model(out[:, -1:], past_key_values=stepwise).logits
        for each in (cache, stepwise) if decode == "dense" else ():
            # nobody needed the keys of generated positions so far
            assert {len(rows) for rows in rows_of(each).values()} == {20}
            model(ids[:, :2], past_key_values=each)
    assert found.equal(out)
    for layer, rows in rows_of(cache).items():
        assert len(rows) == (30 if decode == "dense" else 28)
        rows = rows.map(lambda x: x[:, :28])
        torch.testing.assert_close(rows.raw, rows_of(stepwise)[layer].raw[:, :28], **EXACT)
        assert run.receipt.layers[layer].decode_queries == (2 * (8 + 9) if decode == "dense" else 0)
    if decode == "sparse":
        # the whole text at once is the same computation
        whole = DynamicCache(config=model.config)
        with topmass.sparsify(model, selector):
            model(out, past_key_values=whole)
        assert_same_rows(stepwise, whole)


@pytest.mark.usefixtures("float64_throughout")
def test_beams_take_their_keys_along(models):
    # an indexer with all keys in its budget changes nothing; keys of the wrong beam would not even fit
    model, ids = models("llama"), tiny_models.prompt(20)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 60}
    with topmass.sparsify(model, select(make(model), 100), decode="sparse", record_support=True):
        found = model.generate(ids, **options)
    assert found.equal(model.generate(ids, **options))


# settings and refusals


def watched(model):
    return sum("forward" in m.__dict__ for m in model.modules())


def test_a_forward_of_the_user_s_own_is_called_and_put_back(models):
    model, ids, seen = tiny_models.build("llama"), tiny_models.prompt(20), []
    module = model.model.layers[1].self_attn

    def mine(*args, **kwargs):
        seen.append(kwargs["hidden_states"].shape[1])
        return type(module).forward(module, *args, **kwargs)

    module.forward = mine
    with topmass.sparsify(model, select(make(model))):
        model(ids)
    assert module.forward is mine
    assert seen == [20]
    with topmass.sparsify(model, select(make(model))):
        module.forward = mine
    assert module.forward is mine


def test_what_watches_is_gone(models):
    model, ids = models("qwen3_5_vl"), tiny_models.prompt(20)
    selector = select(make(models("qwen3_5_vl")))
    with topmass.sparsify(model, selector):
        model(ids)
        # the decoder, and the two full-attention layers
        assert watched(model) == 3
    assert watched(model) == 0
    for trouble in (lambda: model(ids[:, :0]), lambda: 1 / 0):
        with pytest.raises((topmass.errors.DataError, ZeroDivisionError)), topmass.sparsify(model, selector):
            trouble()
        assert watched(model) == 0
    with topmass.sparsify(model, topmass.OracleSelector(budget=9)):
        assert watched(model) == 1


def test_an_indexer_of_another_model_is_refused(models):
    indexer = make(models("llama"))
    for family, reason in (("qwen3", "model_type is 'qwen3'"), ("mha", "kv_heads is 4, the indexer's model had 2")):
        with pytest.raises(ConfigError, match=reason), topmass.sparsify(models(family), select(indexer)):
            pass
    shifted = tiny_models.build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(ConfigError, match="rope is"), topmass.sparsify(shifted, select(indexer)):
        pass


def test_a_fine_tune_is_served_with_a_warning(models):
    indexer, tuned = make(models("llama")), tiny_models.build("llama", seed=1)
    words = "if it is a fine-tune, check the recall"
    with pytest.warns(UserWarning, match=words), topmass.sparsify(tuned, select(indexer)) as run:
        tuned(tiny_models.prompt(20))
    assert run.receipt.layers[0].mode == "sparse"
    # another dtype is the same model
    assert describe_model(copy.deepcopy(models("llama")).float())[0] == describe_model(models("llama"))[0]


def test_layers_without_an_indexer_stay_dense(models):
    model = models("llama")
    configs = index_configs(model, dim=6)
    indexer = Indexer.create({1: configs[1]}, describe_model(model)[0])
    with topmass.sparsify(model, indexer.selector(budget=9)) as run:
        model(tiny_models.prompt(30))
    assert [run.receipt.layers[i].mode for i in (0, 1)] == ["dense", "sparse"]
    plan = topmass.Plan(layers={0: topmass.Budget(tokens=9)})
    cache = DynamicCache()
    with topmass.sparsify(model, make(model).selector(budget=plan)) as run:
        model(tiny_models.prompt(30), past_key_values=cache)
    assert [run.receipt.layers[i].mode for i in (0, 1)] == ["sparse", "dense"]
    assert list(rows_of(cache)) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_decides_the_dtype(dtype):
    model = tiny_models.build("qwen3", dtype=dtype)
    indexer, cache = Indexer.create(index_configs(model, dim=6), describe_model(model)[0]), DynamicCache()
    with topmass.sparsify(model, indexer.selector(budget=9)) as run:
        logits = model(tiny_models.prompt(30), past_key_values=cache).logits
    assert logits.isfinite().all()
    assert run.receipt.layers[0].mode == "sparse"
    assert rows_of(cache)[0].raw.dtype == dtype
    assert not rows_of(cache)[0].raw.requires_grad
    assert all(p.dtype == torch.float32 and p.requires_grad for p in indexer.parameters())


# what it costs


@pytest.mark.usefixtures("float64_throughout")
def test_an_indexer_takes_one_call_of_its_ops_where_the_ids_fit(models, monkeypatch):
    model, ids = models("llama"), tiny_models.prompt(100)
    found = []
    # ids of 8 keys for a query, 4 bytes each
    for limit in (4 * 8 * 100, 4 * 8 * 10):
        monkeypatch.setattr(_logits, "WORKSPACE_BYTES", limit)
        with topmass.sparsify(model, select(make(model), 9)) as run:
            found.append((model(ids).logits, run.receipt.layers[0].selection))
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    assert [s["index_topk=reference"] for _, s in found] == [1, 10]


def nothing(cache):
    return [0, 1], 9


def reversed_sequences(cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return [1, 0], 9


def first_sequence(cache):
    cache.batch_select_indices(torch.tensor([0]))
    return [0], 9


def each_twice(cache):
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1], 9


def without_two_generated(cache):
    cache.crop(-2)
    return [0, 1], 7


def without_any_generated(cache):
    cache.crop(-14)
    return [0, 1], -5


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("most", [64, 3])
@pytest.mark.parametrize("features", ["hidden", "qk"])
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", nothing),
        ("llama", reversed_sequences),
        ("llama", first_sequence),
        ("llama", each_twice),
        ("llama", without_two_generated),
        ("llama", without_any_generated),
        # transformers has no other change of a linear layer's cache
        ("qwen3_5", nothing),
        ("qwen3_5", reversed_sequences),
    ],
)
@pytest.mark.parametrize("dense_below", [0, 20])
def test_positions_that_waited_are_indexed_as_if_they_had_not(
    models, monkeypatch, family, features, change, most, dense_below
):
    monkeypatch.setattr(index_keys, "MOST_WAITING", most)
    model, ids = models(family), tiny_models.prompt(40, batch=2)
    # the first 20 are kept dense: their keys are written at once, or wait
    selector = select(make(model, features=features), 11, dense_below=dense_below)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), topmass.sparsify(model, selector):
        model(ids[:, :20], past_key_values=cache)
        for i in range(20, 29):
            model(ids[:, i : i + 1], past_key_values=cache)
        order, generated = change(cache)
        stop = 20 + generated
        found = model(ids[order, stop : stop + 8], past_key_values=copy.deepcopy(cache)).logits
    plain = DynamicCache(config=model.config)
    # the same with every key written at once
    with torch.no_grad(), topmass.sparsify(model, selector) as run:
        run.index._defer = False
        model(ids[order, :20], past_key_values=plain)
        for i in range(20, stop):
            model(ids[order, i : i + 1], past_key_values=plain)
        if stop < 20:
            plain.crop(stop - 20)
        wanted = model(ids[order, stop : stop + 8], past_key_values=plain).logits
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
@pytest.mark.parametrize("most", [64, 3])
def test_tokens_that_wait_together_part_with_their_caches(models, monkeypatch, family, most):
    monkeypatch.setattr(index_keys, "MOST_WAITING", most)
    model, ids, other = models(family), tiny_models.prompt(40), tiny_models.prompt(40, seed=1)
    copies, caches = [], [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 11)):
        for prompt, cache in zip((ids, other), caches, strict=True):
            model(prompt[:, :20], past_key_values=cache)
        for i in range(20, 30):
            # two prompts in turns, and a copy that goes on by itself
            for prompt, cache in zip((ids, other), caches, strict=True):
                model(prompt[:, i : i + 1], past_key_values=cache)
            if i == 24:
                copies.append(copy.deepcopy(caches[0]))
            elif i > 24:
                model(ids[:, i : i + 1], past_key_values=copies[0])
        # a layer whose keys change alone leaves the others theirs
        next(x for x in caches[0].layers if getattr(x, "index_seen", 0)).reorder_cache(torch.tensor([0]))
        assert {x.index_seen for x in caches[0].layers if hasattr(x, "index_seen")} == {30}
        pairs = list(zip((ids, ids, other), (caches[0], *copies, caches[1]), strict=True))
        for prompt, cache in pairs:
            model(prompt[:, 30:31], past_key_values=cache)
        found = [model(prompt[:, 31:], past_key_values=cache).logits for prompt, cache in pairs]
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 11)) as run:
        # every key written at once
        run.index._defer = False
        for (prompt, _), logits in zip(pairs, found, strict=True):
            cache = DynamicCache(config=model.config)
            for lo, hi in ((0, 20), *((i, i + 1) for i in range(20, 31)), (31, 40)):
                expected = model(prompt[:, lo:hi], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, **EXACT)


def test_a_short_prompt_waits_on_while_tokens_are_generated(models, monkeypatch):
    monkeypatch.setattr(index_keys, "MOST_WAITING", 4)
    model, ids, cache = models("llama"), tiny_models.prompt(40), DynamicCache()
    written = []
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 9, dense_below=40)):
        model(ids[:, :20], past_key_values=cache)
        for i in range(20, 26):
            model(ids[:, i : i + 1], past_key_values=cache)
            rows = cache.layers[0].index_rows
            written.append(0 if rows is None else len(rows))
    # it takes no room of theirs
    assert written == [0, 0, 0, 0, 25, 25]


def test_a_token_that_failed_halfway_can_be_cropped_away(models):
    model, ids, cache = tiny_models.build("llama"), tiny_models.prompt(40), DynamicCache()
    first = model.model.layers[0]
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 9)):
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
        # the layers after it do not see the token
        mlp, first.mlp = first.mlp, None
        with pytest.raises(TypeError):
            model(ids[:, 21:22], past_key_values=cache)
        first.mlp = mlp
        for layer in cache.layers:
            layer.crop(20 - layer.get_seq_length())
        assert [layer.index_seen for layer in cache.layers] == [20] * len(cache.layers)
        found = model(ids[:, 20:], past_key_values=cache).logits
        wanted = model(ids).logits[:, 20:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_with_gradients_keep_no_graph(models):
    model, ids, cache = models("llama"), tiny_models.prompt(24), DynamicCache()
    with topmass.sparsify(model, select(make(model), 9)):
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:21], past_key_values=cache)
        embeds = model.get_input_embeddings()(ids[:, 21:22]).detach().requires_grad_()
        model(inputs_embeds=embeds, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.index_seen == 22
    assert not any(x.features.requires_grad for x in layer.index_alone())


@pytest.mark.parametrize("features", ["hidden", "qk"])
def test_generating_keeps_neither_old_tables_nor_old_caches(models, monkeypatch, features):
    monkeypatch.setattr(index_keys, "MOST_WAITING", 2)
    model, ids = models("llama"), tiny_models.prompt(40)
    with torch.no_grad(), topmass.sparsify(model, select(make(model, features=features), 11)) as run:
        cache = model(ids, use_cache=True).past_key_values
        for i in range(12):
            model(ids[:, i : i + 1], past_key_values=cache)
            # what the layers of one forward share: cosines and sines of what waited, and of all positions
            assert len(run.index._joined) <= 4
            assert len(run.index._tables) <= 1
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None


@pytest.mark.usefixtures("float64_throughout")
def test_layers_share_their_tables_until_a_cache_is_changed(models):
    model, ids, cache = models("llama"), tiny_models.prompt(40), DynamicCache()
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 9), decode="sparse"):
        for lo, hi in ((0, 20), (20, 21), (21, 30)):
            model(ids[:, lo:hi], past_key_values=cache)
        rows = [layer.index_rows for layer in cache.layers]
        assert len(rows[0]) == 30
        assert rows[0].cos is rows[1].cos
        assert rows[0].sin is rows[1].sin
        assert rows[0].raw is not rows[1].raw
        cache.layers[0].reorder_cache(torch.tensor([0]))
        rest = model(ids[:, 30:], past_key_values=copy.deepcopy(cache)).logits
        whole = model(ids).logits[:, 30:]
    torch.testing.assert_close(rest, whole, **EXACT)


def test_a_prompt_below_the_crossover_computes_no_index_vectors(models, monkeypatch):
    model, ids = models("llama"), tiny_models.prompt(30)
    selector = select(make(model), 9, dense_below=30)
    monkeypatch.setattr(IndexKeys, "vectors", None)
    cache = DynamicCache()
    with torch.no_grad(), topmass.sparsify(model, selector) as run:
        model(ids, past_key_values=cache)
    assert run.receipt.layers[0].mode == "dense"
    assert cache.layers[0].index_rows is None
    assert cache.layers[0].index_seen == 30


def test_a_long_prompt_does_not_wait(models, monkeypatch):
    model, ids = models("llama"), tiny_models.prompt(30)
    monkeypatch.setattr(index_keys, "MOST_PROMPT_VALUES", 29 * model.config.hidden_size)
    cache = DynamicCache()
    with torch.no_grad(), topmass.sparsify(model, select(make(model), 9, dense_below=40)):
        model(ids[:, :20], past_key_values=cache)
        assert cache.layers[0].index_rows is None
        # a second prompt does not wait behind a first
        model(ids[:, 20:], past_key_values=cache)
        assert len(cache.layers[0].index_rows) == 30
        assert not cache.layers[0].index_waiting
        cache = DynamicCache()
        model(ids, past_key_values=cache)
    assert len(cache.layers[0].index_rows) == 30
