"""What the vLLM plugin decides without vLLM: settings, batches, pages, receipts, and the attention of one layer."""

import json
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

import topmass
from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError, DataError, UnsupportedModelError
from topmass.integrations.vllm.batch import Batch, Step, first_sparse, keys_read
from topmass.integrations.vllm.metrics import HELP, Counters, samples
from topmass.integrations.vllm.pages import PageLayout
from topmass.integrations.vllm.receipts import KEPT_DENSE, Receipts
from topmass.integrations.vllm.service import Arithmetic, Service, open_service
from topmass.integrations.vllm.settings import Settings
from topmass.ops import index_topk, sparse_prefill
from topmass.ops._triton_common import INTERPRETED
from topmass.selection.indexer import Indexer, IndexerConfig, ModelFingerprint, index_rope

MODEL = ModelFingerprint(
    model_type="llama",
    hidden_size=24,
    num_layers=3,
    full_layers=(0, 2),
    q_heads=4,
    kv_heads=2,
    head_dim=8,
    vocab_size=32,
)
RULES = [
    SupportRule(budget=Budget(tokens=7)),
    SupportRule(budget=Budget(tokens=7), dense_below=19, sink=2, window=3),
    SupportRule(budget=Budget(tokens=9), granularity=Granularity(kv_block=2), sink=1, window=2),
    SupportRule(budget=Budget(share=Fraction(1, 10))),
    SupportRule(budget=Budget(share=Fraction(1, 3)), window=5, sink=3, dense_below=4),
    SupportRule(budget=Budget(tokens=5), window=0),
    SupportRule(budget=Budget(tokens=13), granularity=Granularity(q_block=8), window=2),
    SupportRule(budget=Budget(share=Fraction(2, 5)), granularity=Granularity(q_block=4, kv_block=2), dense_below=11),
]


def indexer(**settings):
    config = IndexerConfig(**{"hidden_size": 24, "dim": 12, "rotary_dim": 8, **settings})
    return Indexer.create({0: config, 2: config}, MODEL, recommended_budget="11")


@pytest.fixture
def saved(tmp_path):
    indexer().save(tmp_path / "indexer")
    return tmp_path / "indexer"


def additional(folder, **settings):
    return {"topmass": {"indexer": str(folder), **settings}}


# settings


def test_settings_of_another_plugin_are_none_of_ours():
    assert Settings.parse({}) is None
    assert Settings.parse(None) is None
    assert Settings.parse({"gdn_prefill_backend": "triton"}) is None


def test_a_file_may_hold_the_settings_and_the_command_line_wins(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('indexer = "here"\nbudget = "5%"\nsink = 4\n[granularity]\nkv_block = 2\n')
    found = Settings.parse({"topmass": {"config": str(file), "budget": 64}})
    assert (found.indexer, found.budget, found.sink) == ("here", Budget(tokens=64), 4)
    assert found.granularity == {"kv_block": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budgte": 1}, "did you mean 'budget'"),
        ({"budget": 0}, "at least 1 token"),
        ({"budget": 8, "plan": "plan.toml"}, "exclude each other"),
        ({"granularity": {"q_block": 3}}, "power of two"),
        ({"granularity": {"kv_block": 3}}, "power of two"),
        ({"granularity": {"tile": 3}}, "q_block and kv_block"),
        ({"decode": "fast"}, "'dense' or 'sparse'"),
        ({"dense_below": -1}, "dense_below"),
        ({"dense_below": "often"}, "dense_below"),
        ({"sink": True}, "sink"),
        ({"log_every": -1}, "log_every"),
        ({"backend": ""}, "backend"),
        ({"config": "no/such/file.toml"}, "Cannot read the settings"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Settings.parse({"topmass": {"indexer": "here", **given}})
    assert "\n" not in str(caught.value)


def test_settings_need_an_indexer_and_a_table():
    with pytest.raises(ConfigError, match="needs 'indexer'"):
        Settings.parse({"topmass": {"budget": 8}})
    with pytest.raises(ConfigError, match="must be a table"):
        Settings.parse({"topmass": "indexer"})


def test_budget_comes_from_the_settings_a_plan_or_the_indexer(saved, tmp_path):
    assert open_service(additional(saved), device="d").selector.budget == Budget(tokens=11)
    assert open_service(additional(saved, budget=9), device="d").selector.budget == Budget(tokens=9)
    Plan(layers={0: Budget(tokens=8), 2: None}).save(tmp_path / "plan.toml")
    service = open_service(additional(saved, plan=str(tmp_path / "plan.toml")), device="d")
    assert service.server(0).threshold == 8
    assert service.server(2).threshold is None
    assert service.threshold == 8


def test_dense_below_auto_wants_a_measurement_of_the_device(tmp_path):
    one = indexer()
    one.info = one.info.replace(crossover={"H100": 4096})
    one.save(tmp_path / "a")
    assert open_service(additional(tmp_path / "a", dense_below="auto"), device="H100").threshold == 4096
    with pytest.raises(ConfigError, match="no measurement on 'A100'"):
        open_service(additional(tmp_path / "a", dense_below="auto"), device="A100")


def test_an_indexer_without_a_recommendation_wants_a_budget(tmp_path):
    one = indexer()
    one.info = one.info.replace(recommended_budget=None)
    one.save(tmp_path / "a")
    with pytest.raises(ConfigError, match="recommends no budget"):
        open_service(additional(tmp_path / "a"), device="d")


def test_missing_and_damaged_indexers_are_refused(saved):
    with pytest.raises(DataError, match="There is no indexer"):
        open_service(additional(saved / "gone"), device="d")
    weights = saved / "indexer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match="is not the file"):
        open_service(additional(saved, sink=1), device="d")


def test_an_indexer_of_another_model_is_refused(saved, tmp_path):
    service = open_service(additional(saved), device="d")
    service.check(MODEL)
    other = ModelFingerprint(**{**{f: getattr(MODEL, f) for f in MODEL.__dataclass_fields__}, "kv_heads": 4})
    with pytest.raises(ConfigError, match="another model: kv_heads is 4"):
        service.check(other)
    indexer(features="qk", hidden_size=32, key_size=16).save(tmp_path / "qk")
    with pytest.raises(ConfigError, match="read hidden states"):
        open_service(additional(tmp_path / "qk"), device="d").check(MODEL)


# batches


def test_first_sparse_and_keys_read_of_shared_blocks_are_those_of_the_rule():
    draw = random.Random(0)
    for _ in range(60):
        unit = Granularity(q_block=draw.choice([2, 4, 8, 16]), kv_block=draw.choice([1, 2, 4]))
        budget = draw.choice([Budget(tokens=draw.randint(20, 60)), Budget(share=Fraction(draw.randint(1, 19), 20))])
        settings = {"sink": draw.randint(0, 4), "window": draw.randint(1, 4), "dense_below": draw.choice([0, 37])}
        try:
            rule = SupportRule(budget=budget, granularity=unit, **settings)
        except ConfigError:
            continue
        start, stop = draw.randint(0, 60), draw.randint(61, 130)
        blocks = -(-stop // unit.q_block) - start // unit.q_block
        support = topmass.ops.topk_support(
            torch.rand(1, 1, blocks, stop // unit.kv_block), rule=rule, q_start=start, q_len=stop - start
        )
        sparse, dense, keys = keys_read(rule, start, stop)
        assert (sparse, dense) == (int(support.sparse_rows().sum()), int((~support.sparse_rows()).sum()))
        assert keys == int(support.mask(stop).sum()) // support.mask(stop).shape[1]
        first = first_sparse(rule)
        assert first is None or not rule.reads_all(0, first + 1)
        assert rule.reads_all(0, 2000 if first is None else first)


@pytest.mark.parametrize("rule", RULES)
def test_first_sparse_and_keys_read_are_those_of_the_rule(rule):
    n = 90
    scores = torch.rand(1, 1, -(-n // rule.granularity.q_block), n // rule.granularity.kv_block)
    support = topmass.ops.topk_support(scores, rule=rule, q_start=0, q_len=n)
    first = first_sparse(rule)
    assert support.sparse_rows().tolist() == [t >= first for t in range(n)]
    for start, stop in ((0, n), (3, 41), (17, 18), (60, 90)):
        sparse, dense, keys = keys_read(rule, start, stop)
        assert sparse == int(support.sparse_rows()[start:stop].sum())
        assert sparse + dense == stop - start
        assert keys == int(support.keys_read()[0, 0, start:stop].sum())


def test_layers_that_never_select_have_no_first_sparse_position():
    assert first_sparse(None) is None
    assert first_sparse(SupportRule(budget=Budget(share=Fraction(1)))) is None
    assert first_sparse(SupportRule(budget=Budget(mass=Fraction(1, 2), tokens=8), dense_below=5)) == 5


def test_a_row_is_prompt_or_generated_by_position_not_by_the_length_of_a_call():
    # one token of a prompt, a decoded token, a prompt that ends in the chunk (as after preemption), padding
    step = Step(requests=["a", "b", "c"], prompt_lens=[40, 40, 40])
    batch = Batch.plan(step, [0, 1, 2, 12, 12], [40, 41, 45, 0])
    found = [(p.request, p.rows, p.start, p.stop, p.generated) for p in batch.parts]
    assert found == [
        ("a", (0, 1), 39, 40, False),
        ("b", (1, 2), 40, 41, True),
        ("c", (2, 7), 35, 40, False),
        ("c", (7, 12), 40, 45, True),
    ]
    dense, sparse = batch.split(32)
    assert [p.request for p in sparse] == ["a", "c"]
    assert [p.rows for p in dense] == [(1, 2), (7, 12)]
    assert batch.split(40)[1] == []
    assert batch.split(None)[1] == []
    every = Batch(parts=batch.parts, sparse_decode=True)
    assert len(every.split(32)[1]) == 4
    assert [p.start for p in every.split(41)[1]] == [40]


# pages


@pytest.mark.parametrize(("heads", "dim", "columns"), [(2, 12, 8), (1, 12, 16), (4, 64, 16), (3, 7, 8), (8, 64, 8)])
def test_pages_return_what_was_written(heads, dim, columns):
    layout = PageLayout.fit(kv_heads=heads, head_dim=8, index_dim=dim)
    assert layout.columns == columns
    cache = torch.full((6, heads, 4, layout.width), float("nan"))
    pages = torch.tensor([3, 1, 5])
    n = 10
    slots = pages[torch.arange(n) // 4] * 4 + torch.arange(n) % 4
    key, value, index = torch.randn(n, heads, 8), torch.randn(n, heads, 8), torch.randn(n, dim)
    opened = layout.open(cache)
    opened.write(key, value, index, slots)
    assert torch.equal(opened.keys[pages].flatten(0, 1)[:n], key)
    assert torch.equal(opened.values[pages].flatten(0, 1)[:n], value)
    assert torch.equal(opened.read_index(pages, n, dim), index)
    assert cache[[0, 2, 4]].isnan().all()


def test_padding_is_written_to_the_page_of_nobody():
    layout = PageLayout.fit(kv_heads=2, head_dim=8, index_dim=16)
    cache = torch.zeros(3, 2, 4, layout.width)
    pages = layout.open(cache)
    ones = torch.ones(3, 2, 8)
    pages.write(ones, ones, ones.flatten(1), torch.tensor([4, -1, -1]))
    assert pages.index[1, 0].eq(1).all()
    assert cache[1:].sum() == 16 + 32
    assert pages.index[0, 1:].eq(0).all()


@pytest.mark.parametrize("heads_first", [True, False])
def test_keys_and_values_lie_as_in_a_page_without_index_keys(heads_first):
    layout = PageLayout.fit(kv_heads=2, head_dim=8, index_dim=16)
    shape = (3, 2, 4, layout.width) if heads_first else (3, 4, 2, layout.width)
    # pages of other layers between
    cache = torch.arange(2.0 * 3 * 8 * layout.width).view(6, *shape[1:])[::2]
    cache = cache if heads_first else cache.transpose(1, 2)
    pages = layout.open(cache)
    rows, index = pages.rows, pages.index
    assert rows.stride() == (2 * 8 * layout.width, 4 * 16, 16, 1)
    assert torch.equal(pages.keys, rows.transpose(1, 2)[..., :8])
    assert torch.equal(pages.values, rows.transpose(1, 2)[..., 8:])
    # together they are the page, and nothing beside it
    for page in range(3):
        held = torch.cat([rows[page].flatten(), index[page].flatten()])
        assert torch.equal(held.sort().values, cache[page].flatten().sort().values)


def test_a_page_in_pieces_is_refused():
    layout = PageLayout.fit(kv_heads=2, head_dim=8, index_dim=16)
    # the heads of all pages one after the other
    cache = torch.zeros(2, 3, 4, layout.width).transpose(0, 1)
    with pytest.raises(UnsupportedModelError, match="VLLM_KV_CACHE_LAYOUT"):
        layout.open(cache)


# receipts


def test_receipts_count_by_layer_with_reasons(tmp_path):
    rules = {0: SupportRule(budget=Budget(tokens=8)), 2: None}
    path = tmp_path / "deep" / "receipts.jsonl"
    lines = []
    receipts = Receipts(rules, path=str(path), say=lines.append, log_every=1e-9)
    receipts.add(Batch.plan(Step(requests=["a"], prompt_lens=[20]), [0, 12], [12]))
    receipts.add(Batch.plan(Step(requests=["b", "a"], prompt_lens=[5, 20]), [0, 5, 15], [5, 22]))
    receipts.ran("triton", {"index_topk": "triton"})
    assert receipts.finish(["nobody"]) == []
    (receipt,) = receipts.finish(["a"])
    assert receipt.generated == 2
    assert receipt.layers[0].sparse == 12
    assert receipt.layers[0].dense == {"within the budget": 8}
    assert receipt.layers[0].keys == 36 + 12 * 8
    assert (receipt.layers[2].sparse, receipt.layers[2].dense) == (0, {KEPT_DENSE: 20})
    assert receipt.layers[2].keys == 210
    assert json.loads(path.read_text())["layers"]["0"]["sparse"] == 12
    assert "30.0 % of its queries sparse" in str(receipt)
    assert lines[-1].startswith("topmass: 1 requests finished; ")
    assert lines[-1].endswith("sparse kernels: triton x 1; selected by index_topk=triton x 1")
    receipts.close()
    assert [json.loads(line)["request"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert receipts.summary()["layers"][0]["dense"] == {"within the budget": 13}


def test_generated_queries_count_where_they_select():
    receipts = Receipts({0: SupportRule(budget=Budget(tokens=8))})
    step = Step(requests=["a"], prompt_lens=[10])
    receipts.add(Batch.plan(step, [0, 1], [11], sparse_decode=True))
    (receipt,) = receipts.finish(["a"])
    assert (receipt.generated, receipt.layers[0].sparse, receipt.layers[0].keys) == (1, 1, 8)


def test_receipts_that_cannot_be_written_stop_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Receipts cannot be written"):
        Receipts({}, path=str(tmp_path / "file" / "receipts.jsonl"))


# one layer


class Layer:
    """Everything that vLLM would hold of one layer and one sequence, and the same arithmetic without pages."""

    def __init__(self, service, length, *, page_size=4, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.service, self.length = service, length
        self.server = service.server(2)
        self.module = self.server.indexer
        self.hidden, self.q = draw(1, length, 24), draw(length, 4, 8)
        self.k, self.v = draw(length, 2, 8), draw(length, 2, 8)
        angle = torch.arange(length)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
        whole = torch.cat([angle, angle], -1)[None].to(dtype)
        self.tables = index_rope(whole.cos(), whole.sin(), self.module.config.rotary_dim)
        self.iq = self.module.project_queries(self.hidden, *self.tables)
        self.raw = self.module.project_keys(self.hidden)
        self.layout = PageLayout.fit(kv_heads=2, head_dim=8, index_dim=service.index_dim)
        n = -(-length // page_size)
        self.pages = torch.randperm(n + 3, generator=generator)[:n].int() + 1
        self.cache = torch.full((n + 4, 2, page_size, self.layout.width), float("nan"), dtype=dtype)
        slots = self.pages.long()[torch.arange(length) // page_size] * page_size + torch.arange(length) % page_size
        self.opened = self.layout.open(self.cache)
        self.opened.write(self.k, self.v, self.raw[0], slots)

    def finish(self, raw):
        return self.module.finish_keys(raw[None], *(x[:, : raw.shape[0]] for x in self.tables))[0]

    def attend(self, start, stop):
        step = Step(requests=["a"], prompt_lens=[self.length])
        (part,) = Batch.plan(step, [0, stop - start], [stop]).parts
        return self.server.attend(
            self.q[start:stop],
            self.iq[0, start:stop],
            self.opened,
            self.pages,
            part,
            arithmetic=Arithmetic(scale=0.5),
            finish=self.finish,
        )

    def expected(self):
        """All of the prompt in one call."""
        rule = self.server.rule
        support = index_topk(
            self.iq,
            self.finish(self.raw[0])[None],
            budget=rule.budget,
            granularity=rule.granularity,
            sink=rule.sink,
            window=rule.window,
            dense_below=rule.dense_below,
            reduce="max_prob",
        )
        return sparse_prefill(self.q[None], self.k[None], self.v[None], support, scale=0.5)[0][0]


@pytest.mark.parametrize("settings", [{}, {"heads": 3}, {"kv_block": 4}])
@pytest.mark.parametrize("chunk", [1, 7, 16, 61])
def test_chunks_over_scattered_pages_equal_one_call_over_all(tmp_path, settings, chunk):
    indexer(**settings).save(tmp_path)
    service = open_service(additional(tmp_path, budget=17, sink=2, window=3), device="d")
    layer = Layer(service, 61)
    out = torch.cat([layer.attend(lo, min(lo + chunk, 61)) for lo in range(0, 61, chunk)])
    torch.testing.assert_close(out, layer.expected(), rtol=2e-6, atol=2e-6)
    assert sum(service.receipts.backends.values()) >= -(-61 // chunk)
    assert service.receipts.selection["index_topk=reference"] == sum(service.receipts.backends.values())


def test_queries_that_share_select_once_unless_they_are_cut(saved):
    said = []
    service = open_service(additional(saved, budget=13, granularity={"q_block": 8}), device="d", say=said.append)
    service.check(MODEL)
    assert said == [
        "topmass: 8 queries share a selection; where the scheduler or a cached prefix cuts them both parts select, so that answers "
        "depend on how prompts are cut."
    ]
    layer = Layer(service, 61)
    for cuts, same in (((0, 61), True), ((0, 24, 56, 61), True), ((0, 20, 61), False)):
        out = torch.cat([layer.attend(lo, hi) for lo, hi in pairwise(cuts)])
        apart = (out - layer.expected()).abs().amax((1, 2)) > 1e-5
        # the block that holds the cut, and no other
        assert same != apart[16:24].any()
        assert not apart[:16].any()
        assert not apart[24:].any()


def test_generated_queries_share_nothing(saved):
    service = open_service(additional(saved, budget=13, granularity={"q_block": 8}, decode="sparse"), device="d")
    layer, alone = Layer(service, 61), Layer(open_service(additional(saved, budget=13), device="d"), 61)
    (part,) = Batch.plan(Step(requests=["a"], prompt_lens=[50]), [0, 1], [61]).parts
    assert part.generated
    one, expected = (
        x.server.attend(
            x.q[60:], x.iq[0, 60:], x.opened, x.pages, part, arithmetic=Arithmetic(scale=0.5), finish=lambda i: i
        )
        for x in (layer, alone)
    )
    assert torch.equal(one, expected)
    receipts = service.receipts
    receipts.add(Batch(parts=(part,), sparse_decode=True))
    assert receipts.total.layers[2].keys == 13


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
@pytest.mark.parametrize("block", [1, 16])
def test_receipts_name_what_chose_the_keys_and_nothing_else(saved, block):
    settings = {"budget": 24, "granularity": {"q_block": block}, "backend": "triton"}
    service = open_service(additional(saved, **settings), device="d")
    layer = Layer(service, 50, dtype=torch.float16)
    layer.attend(0, 50)
    assert service.receipts.backends == {"triton": 1}
    assert service.receipts.selection == {"index_topk=triton": 1}


@pytest.mark.parametrize("block", [1, 16])
def test_long_chunks_are_cut_to_fit_the_workspace(saved, monkeypatch, block):
    from topmass.ops import _logits

    service = open_service(additional(saved, budget=24, sink=1, granularity={"q_block": block}), device="d")
    layer = Layer(service, 50, seed=1)
    whole = layer.attend(0, 50)
    monkeypatch.setattr(_logits, "WORKSPACE_BYTES", 4 * 50 * 4 * 8)
    torch.testing.assert_close(layer.attend(0, 50), whole, rtol=1e-6, atol=1e-6)


def test_a_named_backend_never_falls_back(saved):
    from topmass.errors import BackendUnavailableError

    service = open_service(additional(saved, budget=9, backend="nonesuch"), device="d")
    with pytest.raises(BackendUnavailableError, match="nonesuch"):
        Layer(service, 20).attend(0, 20)


def test_a_service_plans_only_inside_a_step(saved):
    service = Service(Settings(indexer=str(saved), budget=9), device="d")
    assert service.plan([0, 4], [4]) is None
    service.step = Step(requests=["a"], prompt_lens=[4])
    assert len(service.plan([0, 4], [4]).parts) == 1
    assert service.receipts.total.layers[0].dense == {"within the budget": 4}


# a frontier's file


def frontier_file(folder, indexer_path, digest, **changed):
    keys = {"name": "indexer", "budget": "9", "q_block": 1, "kv_block": 1, "share": "layer", "sink": 1, "window": 2}
    keys |= {"dense_below": 12, "indexer": str(indexer_path), "indexer_digest": digest} | changed
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path = folder / "frontier.toml"
    path.write_text("\n".join(["version = 1", 'note = "n"', "[selector]", *lines, "[measured]", 'model = "m"', ""]))
    return path


def test_a_frontier_s_file_gives_the_selector_that_load_selector_gives(saved, tmp_path):
    path = frontier_file(tmp_path, "indexer", Indexer.load(saved).digest)
    found = open_service({"topmass": {"config": str(path)}}, device="d").selector
    assert found.fingerprint == topmass.load_selector(path).fingerprint
    assert found.rule(0) == SupportRule(budget=Budget(tokens=9), sink=1, window=2, dense_below=12)


def test_what_stands_beside_a_frontier_s_file_wins(saved, tmp_path):
    path = frontier_file(tmp_path, "indexer", "another", q_block=4)
    assert Settings.parse({"topmass": {"config": str(path)}}).granularity == {"q_block": 4, "kv_block": 1}
    given = {"config": str(path), "granularity": {"q_block": 1}, "budget": 8}
    with pytest.raises(ConfigError, match="measured with another"):
        open_service({"topmass": given}, device="d")
    service = open_service({"topmass": {**given, "indexer": str(saved)}}, device="d")
    assert service.selector.budget == Budget(tokens=8)
    assert service.settings.granularity == {"q_block": 1, "kv_block": 1}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": "dense"}, "leave 'topmass' out"),
        ({"name": "pooled"}, "vLLM serves indexers alone"),
        ({"share": "kv_head"}, "once for all heads"),
        ({"pool": "sum"}, "unknown key 'pool'"),
    ],
)
def test_a_frontier_s_file_that_cannot_be_served_is_refused(saved, tmp_path, changed, words):
    path = frontier_file(tmp_path, saved, Indexer.load(saved).digest, **changed)
    with pytest.raises(ConfigError, match=words):
        Settings.parse({"topmass": {"config": str(path)}})
    path.write_text(path.read_text().replace("version = 1", "version = 2"))
    with pytest.raises(ConfigError, match="not a selector of version 1"):
        Settings.parse({"topmass": {"config": str(path)}})


# counters


def test_counters_are_those_of_the_receipts():
    receipts = Receipts({0: SupportRule(budget=Budget(tokens=4)), 2: None})
    receipts.add(Batch.plan(Step(requests=["a"], prompt_lens=[10]), [0, 12], [12]))
    receipts.ran("reference", {"index_topk": "reference"})
    found = {(name, labels): value for name, labels, value in samples(receipts) if value}
    assert found == {
        ("topmass:generated_queries", ()): 2,
        ("topmass:sparse_queries", (("layer", "0"),)): 6,
        ("topmass:keys_read", (("layer", "0"),)): 1 + 2 + 3 + 4 + 6 * 4,
        ("topmass:keys_read", (("layer", "2"),)): 55,
        ("topmass:dense_queries", (("layer", "0"), ("reason", "within the budget"))): 4,
        ("topmass:dense_queries", (("layer", "2"), ("reason", KEPT_DENSE))): 10,
        ("topmass:kernel_calls", (("backend", "reference"),)): 1,
        ("topmass:selection_calls", (("backend", "reference"), ("op", "index_topk"))): 1,
    }
    assert {name for name, _, _ in samples(receipts)} <= set(HELP)


def test_counters_of_an_engine_are_read_by_prometheus(tmp_path):
    prometheus = pytest.importorskip("prometheus_client")
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = prometheus.CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    receipts = Receipts({0: SupportRule(budget=Budget(tokens=4))})
    counters = Counters(tmp_path, {"model_name": "m"})
    for _ in range(2):
        receipts.add(Batch.plan(Step(requests=["a"], prompt_lens=[10]), [0, 10], [10]))
        counters.write(receipts)
    value = registry.get_sample_value
    assert value("topmass:sparse_queries_total", {"model_name": "m", "layer": "0"}) == 12
    assert value("topmass:requests_total", {"model_name": "m"}) == 0
    # a second engine of the same process
    Counters(tmp_path, {"model_name": "m"}).write(receipts)
    assert value("topmass:sparse_queries_total", {"model_name": "m", "layer": "0"}) == 24
