"""Indexers as files: what is saved comes back, and what is damaged is refused without harm."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch

import topmass
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError, DataError
from topmass.ops import index_topk
from topmass.selection import AttentionInputs, artifact, indexer
from topmass.selection.indexer import (
    Indexer,
    IndexerConfig,
    IndexerInfo,
    IndexerSelector,
    ModelFingerprint,
    rotate_half_split,
    unrotate_half_split,
)

MODEL = ModelFingerprint(
    model_type="qwen3",
    hidden_size=12,
    num_layers=4,
    full_layers=(1, 3),
    q_heads=4,
    kv_heads=2,
    head_dim=6,
    vocab_size=50,
    rope={"rope_type": "default", "rope_theta": 1e4},
    weights="abc",
)


def make(seed=0, *, info=None, **config):
    layers = {i: IndexerConfig(hidden_size=12, **{"dim": 8, "rotary_dim": 4} | config) for i in (1, 3)}
    return Indexer.create(layers, MODEL, seed=seed, **(info or {}))


def weights_of(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(x.equal(b[name]) and x.dtype == b[name].dtype for name, x in a.items())


# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path, dtype):
    trained = make(
        kv_block=4,
        heads=2,
        reduce="max",
        info={
            "model": "someone/model",
            "granularity": Granularity(q_block=32, kv_block=4),
            "training_tokens": 10**7,
            "loss": {"name": "kl", "pool": "sum", "final": 0.25},
            "recipe": {"steps": 100},
            "held_out": {"length": 4096, "budget": 256},
            "recall": {1: 0.75, 3: 0.5},
            "retained_mass": {1: 0.9, 3: 0.8},
            "recommended_budget": "mass:0.95<=4096",
            "crossover": {"NVIDIA H100": 8192},
        },
    ).to(dtype)
    trained.save(tmp_path / "out" / "indexer")

    loaded = topmass.load_indexer(tmp_path / "out" / "indexer")

    assert sorted(p.name for p in (tmp_path / "out" / "indexer").iterdir()) == ["indexer.json", "indexer.safetensors"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["indexer"]
    assert loaded.info == trained.info
    assert same(weights_of(loaded), weights_of(trained))
    assert loaded.digest == trained.digest
    assert loaded.layer(3).config.kv_block == 4
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_directory_keeps_its_other_files(tmp_path):
    (tmp_path / "log.jsonl").write_text("kept")
    make(0).save(tmp_path)
    make(1).save(tmp_path)

    assert same(weights_of(Indexer.load(tmp_path)), weights_of(make(1)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["indexer.json", "indexer.safetensors", "log.jsonl"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}-*"))


def test_a_failed_save_leaves_the_old_indexer(tmp_path, monkeypatch):
    target = tmp_path / "indexer"
    make(0).save(target)
    broken = make(1)
    with torch.no_grad():
        broken.layer(1).k_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"was not saved: layers\.1\.k_proj\.weight holds NaN"):
        broken.save(target)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"Cannot write the indexer .* No space left on device"):
        make(1).save(target)
    with pytest.raises(DataError, match="No space left"):
        make(1).save(tmp_path / "new")

    assert [p.name for p in tmp_path.iterdir()] == ["indexer"]
    assert same(weights_of(Indexer.load(target)), weights_of(make(0)))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "indexer"):
        with pytest.raises(DataError, match="Cannot write the indexer"):
            make().save(path)
    assert (tmp_path / "file").read_text() == "kept"


def edit(path, change):
    data = json.loads((path / "indexer.json").read_text())
    change(data)
    (path / "indexer.json").write_text(json.dumps(data))


def truncate(path, name):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])


def rewrite(path, change):
    """Other weights, and a description that agrees with the file."""
    tensors = change(safetensors.torch.load_file(path / "indexer.safetensors"))
    artifact.write_artifact(path, Indexer.load(path).info, tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "indexer.json").unlink(), "has no readable indexer.json, so it is no indexer"),
        (lambda p: (p / "indexer.safetensors").unlink(), "has no readable indexer.safetensors"),
        (lambda p: truncate(p, "indexer.json"), "indexer.json cannot be read"),
        (lambda p: truncate(p, "indexer.safetensors"), "indexer.safetensors is damaged"),
        (lambda p: (p / "indexer.safetensors").write_bytes(b""), "indexer.safetensors is damaged"),
        (lambda p: (p / "indexer.json").write_bytes(b"\xff\xfe"), "indexer.json cannot be read"),
        (lambda p: (p / "indexer.json").write_text("[]"), "it holds no object"),
        (lambda p: edit(p, lambda d: d.update(schema_version=9)), "schema version 9; this topmass reads version 1"),
        (lambda p: edit(p, lambda d: d.pop("schema_version")), "schema version None"),
        (lambda p: edit(p, lambda d: d.pop("fingerprint")), "the field 'fingerprint' is missing"),
        (lambda p: edit(p, lambda d: d.update(colour="red")), "colour"),
        (lambda p: edit(p, lambda d: d.update(layers=[])), "cannot be read"),
        (lambda p: edit(p, lambda d: d["layers"]["1"].update(dim=-4)), "dim must be a whole number"),
        (
            lambda p: edit(p, lambda d: d["layers"].update({"2": d["layers"]["1"]})),
            "Layer 2 is no full-attention layer",
        ),
        (lambda p: edit(p, lambda d: d["layers"].pop("3")), "do not fit its indexer.json"),
        (lambda p: edit(p, lambda d: d.update(weights_sha256="0")), "is not the file that indexer.json describes"),
        (lambda p: rewrite(p, lambda t: dict(list(t.items())[1:])), "do not fit its indexer.json"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    make().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        topmass.load_indexer(tmp_path)
    assert "\n" not in str(caught.value)
    assert "distil it again" in str(caught.value)


def test_weights_that_are_not_finite(tmp_path, monkeypatch):
    make().save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_check_finite", lambda *_: None)
        rewrite(tmp_path, lambda t: {**t, "layers.3.q_norm.weight": t["layers.3.q_norm.weight"] / 0})
    with pytest.raises(DataError, match=r"is of no use: layers\.3\.q_norm\.weight holds NaN or infinity"):
        topmass.load_indexer(tmp_path)


def test_no_indexer_at_all(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"There is no indexer at .*; give the directory"):
        topmass.load_indexer(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"the shipped one is topmass\.load_reference_indexer"):
        topmass.load_indexer("reference")
    monkeypatch.setattr(indexer, "REFERENCE", tmp_path / "reference_indexer")
    with pytest.raises(DataError, match=r"reference indexer is missing from .*reference_indexer; reinstall"):
        topmass.load_reference_indexer()
    make(5).save(tmp_path / "reference_indexer")
    assert topmass.load_reference_indexer().digest == make(5).digest


# module


def test_the_seed_decides_the_weights():
    before = torch.random.get_rng_state()
    first, again, other = make(3), make(3), make(4)

    assert torch.random.get_rng_state().equal(before)
    assert same(weights_of(first), weights_of(again))
    assert first.digest == again.digest != other.digest
    assert not first.layer(1).q_proj.weight.equal(first.layer(3).q_proj.weight)
    assert first.layer(2) is None


def test_what_contradicts_itself():
    with pytest.raises(ConfigError, match="at least one layer"):
        IndexerInfo(layers={}, fingerprint=MODEL)
    mixed = {i: IndexerConfig(hidden_size=12, kv_block=b) for i, b in ((1, 1), (3, 4))}
    with pytest.raises(ConfigError, match="need one kv_block and one reduce"):
        IndexerInfo(layers=mixed, fingerprint=MODEL)
    for granularity in (Granularity(kv_block=2), Granularity(share="kv_head")):
        with pytest.raises(ConfigError, match="does not fit the layers"):
            make(info={"granularity": granularity})
    with pytest.raises(ConfigError, match="budget"):
        make(info={"recommended_budget": "many"})


def test_fingerprints():
    assert MODEL.refusal(MODEL) is None
    assert MODEL.doubt(MODEL) is None
    for changes in ({"head_dim": 8}, {"full_layers": (1, 2)}, {"rope": {}}, {"model_type": "llama"}):
        reason = MODEL.refusal(dataclasses.replace(MODEL, **changes))
        assert reason is not None
        assert next(iter(changes)) in reason
    for changes in ({"vocab_size": 51}, {"weights": "abd"}):
        tuned = dataclasses.replace(MODEL, **changes)
        assert MODEL.refusal(tuned) is None
        assert next(iter(changes)) in MODEL.doubt(tuned)
    assert MODEL.doubt(dataclasses.replace(MODEL, weights="")) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rope_can_be_taken_out(dtype, factor):
    x = torch.randn(2, 9, 8, dtype=dtype)
    angle = torch.arange(9)[:, None] * torch.tensor([1.0, 0.1])
    angle = torch.cat([angle, angle], -1)
    # tables as a model in this dtype has them, with an attention factor in them
    cos, sin = (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)
    turned = rotate_half_split(x.double(), cos, sin)

    assert unrotate_half_split(turned, cos, sin).allclose(x.double(), rtol=0, atol=1e-13)
    back = unrotate_half_split(turned.to(dtype), cos, sin)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), x.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)


# selector


def vectors(n=20, groups=20, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(s, generator=generator, dtype=dtype) for s in ((2, n, 1, dim), (2, groups, dim)))


def test_the_selector_is_the_op():
    iq, ik = vectors(groups=5)
    q = torch.zeros(2, 20, 4, 6)
    selector = make(kv_block=4, reduce="max", score_dtype="bfloat16").selector(budget=16, sink=2, window=2)
    support = selector.select(AttentionInputs(q=q, k=q[:, :, :2], layer=3, iq=iq, ik=ik))

    options = {"granularity": Granularity(kv_block=4), "sink": 2, "window": 2}
    expected = index_topk(iq, ik, budget=16, reduce="max", score_dtype=torch.bfloat16, **options)
    assert support.mask(20).equal(expected.mask(20))
    with pytest.raises(ConfigError, match=r"run it inside topmass\.sparsify"):
        selector.select(AttentionInputs(q=q, k=q[:, :, :2], layer=3))


def test_the_selector_takes_the_indexers_granularity():
    own = Granularity(q_block=8, kv_block=4)
    trained = make(kv_block=4, info={"granularity": own})

    selector = IndexerSelector(trained, budget="25%")

    assert selector.granularity == own
    assert selector.per_query().granularity == Granularity(kv_block=4)
    assert selector.per_query().indexer is trained
    assert selector.rule(0) is None
    assert isinstance(selector.rule(3), SupportRule)
    assert trained.selector(budget=64, granularity=Granularity(kv_block=4)).granularity.q_block == 1


def test_another_reduction_has_the_same_weights_and_another_digest(tmp_path):
    trained = make()
    other = trained.reducing("max")
    other.save(tmp_path / "other")

    assert {c.reduce for c in other.info.layers.values()} == {"max"}
    assert {c.reduce for c in trained.info.layers.values()} == {"max_prob"}
    assert other.digest != trained.digest
    assert topmass.load_indexer(tmp_path / "other").digest == other.digest
    assert all(torch.equal(w, trained.state_dict()[name]) for name, w in other.state_dict().items())
    iq, ik = vectors()
    q = torch.zeros(2, 20, 4, 6)
    for served, how in ((trained, "max_prob"), (other, "max")):
        support = served.selector(budget=8, granularity=Granularity(q_block=4)).select(
            AttentionInputs(q=q, k=q[:, :, :2], layer=3, iq=iq, ik=ik)
        )
        expected = index_topk(iq, ik, budget=8, granularity=Granularity(q_block=4), reduce=how)
        assert support.mask(20).equal(expected.mask(20))


def test_the_shipped_indexer_scores_blocks_by_probability():
    assert {c.reduce for c in topmass.load_reference_indexer().info.layers.values()} == {"max_prob"}


def test_the_fingerprint_tells_indexers_apart():
    selectors = [make(seed).selector(budget=64) for seed in (0, 0, 1)]
    prints = [s.fingerprint for s in selectors]
    assert prints[0] == prints[1] != prints[2]
    assert selectors[0].config()["indexer"] == make(0).digest
    with torch.no_grad():
        selectors[0].indexer.layer(1).q_norm.weight[0] += 1
    assert selectors[0].fingerprint != prints[0]


def test_settings_that_cannot_be():
    for settings, message in (
        ({"granularity": Granularity(share="kv_head")}, "share must be 'layer'"),
        ({"granularity": Granularity(kv_block=2)}, "kv_block must be 1, got 2"),
        ({"pool": "max"}, "pool has no effect"),
        ({"budget": 1}, "cannot hold"),
        ({"window": -1}, "must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            make().selector(**{"budget": 64, **settings})


def test_what_is_kept_for_serving_follows_the_weights():
    indexer = make(0)
    cpu, half = torch.device("cpu"), torch.bfloat16
    first, digest = indexer.served(1, cpu, half), indexer.digest
    assert indexer.served(1, cpu, half) is first
    assert first.q_proj.weight.dtype == half
    assert first.q_norm.weight.dtype == torch.float32
    with torch.no_grad():
        indexer.layer(1).q_proj.weight[0, 0] += 1
    changed = indexer.served(1, cpu, half)
    assert changed.q_proj.weight[0, 0] != first.q_proj.weight[0, 0]
    assert indexer.digest != digest
    again = indexer.digest
    indexer.load_state_dict({k: v.clone() * 2 for k, v in indexer.state_dict().items()}, assign=True)
    torch.testing.assert_close(indexer.served(1, cpu, half).q_proj.weight, 2 * changed.q_proj.weight)
    assert indexer.digest not in (digest, again)
    assert indexer.served(2, cpu, half) is None


def test_weights_made_in_inference_mode_are_never_out_of_date():
    with torch.inference_mode():
        indexer = make(0)
        digest, served = indexer.digest, indexer.served(1, torch.device("cpu"), torch.bfloat16)
        indexer.layer(1).q_proj.weight.mul_(2)
        assert indexer.digest != digest
        found = indexer.served(1, torch.device("cpu"), torch.bfloat16)
    torch.testing.assert_close(found.q_proj.weight, 2 * served.q_proj.weight)
