"""An indexer's projections: RoPE layout, pooling before norm and RoPE, complete groups only."""

import dataclasses
import json

import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.errors import ConfigError
from topmass.ops import index_topk
from topmass.selection.indexer import IndexerConfig, LayerIndexer, rotate_half_split

LEN, HIDDEN = 11, 12


def tables(rotary_dim, length=LEN, dtype=torch.float64):
    """Cosines and sines as transformers gives them: `[1, len, rotary_dim]`, both halves alike."""
    frequency = 10.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def make(dtype=torch.float64, **fields):
    torch.manual_seed(2)
    indexer = LayerIndexer(IndexerConfig(hidden_size=HIDDEN, **{"dim": 8, "rotary_dim": 4} | fields)).to(dtype)
    # weights of 1 would hide which norm belongs where
    for norm in (indexer.q_norm, indexer.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return indexer, torch.randn(2, LEN, HIDDEN, dtype=dtype)


def normed(x, norm, eps=1e-6):
    return x / (x.pow(2).mean() + eps).sqrt() * norm.weight


def rotated(x, position, rotary_dim):
    """Turn pairs (i, i + rotary_dim / 2) by position x frequency."""
    out = x.clone()
    for i in range(rotary_dim // 2):
        angle = torch.tensor(position * 10.0 ** (-2 * i / rotary_dim), dtype=x.dtype)
        j = i + rotary_dim // 2
        out[i] = x[i] * angle.cos() - x[j] * angle.sin()
        out[j] = x[j] * angle.cos() + x[i] * angle.sin()
    return out


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_queries_are_normed_then_turned_at_their_own_position(rotary_dim, heads):
    indexer, hidden = make(heads=heads, rotary_dim=rotary_dim)

    q = indexer.project_queries(hidden, *(tables(rotary_dim) if rotary_dim else ()))

    weight = indexer.q_proj.weight.view(heads, 8, HIDDEN)
    for t in range(LEN):
        for h in range(heads):
            expected = rotated(normed(weight[h] @ hidden[1, t], indexer.q_norm), t, rotary_dim)
            torch.testing.assert_close(q[1, t, h], expected)


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_keys_are_pooled_then_normed_then_turned_at_the_first_position(rotary_dim, r):
    indexer, hidden = make(kv_block=r, rotary_dim=rotary_dim)

    k = indexer.finish_keys(indexer.project_keys(hidden), *(tables(rotary_dim) if rotary_dim else ()))

    assert k.shape == (2, LEN // r, 8)
    for j in range(LEN // r):
        mean = sum(indexer.k_proj.weight @ hidden[1, t] for t in range(j * r, (j + 1) * r)) / r
        torch.testing.assert_close(k[1, j], rotated(normed(mean, indexer.k_norm), j * r, rotary_dim))


def test_rope_is_half_split_not_interleaved():
    x = torch.randn(LEN, 8, dtype=torch.float64)
    cos, sin = tables(8)

    turned = rotate_half_split(x, cos[0], sin[0])

    pairs = torch.view_as_complex(torch.stack([x[:, :4], x[:, 4:]], -1))
    angle = torch.complex(cos[0, :, :4], sin[0, :, :4])
    torch.testing.assert_close(turned, torch.cat([(pairs * angle).real, (pairs * angle).imag], -1))
    interleaved = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * angle).flatten(-2)
    assert torch.equal(turned[0], interleaved[0])
    assert ((turned - interleaved)[1:].norm(dim=-1) > 0.1).all()


def test_rope_leaves_the_other_dimensions_and_the_length():
    x = torch.randn(LEN, 8, dtype=torch.float64)
    cos, sin = tables(4)

    turned = rotate_half_split(x, cos[0], sin[0])

    assert torch.equal(turned[:, 4:], x[:, 4:])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_scores_depend_on_distance_only():
    x, y = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = (table[0] for table in tables(8))

    def product(i, j):
        return rotate_half_split(x, cos[i], sin[i]) @ rotate_half_split(y, cos[j], sin[j])

    torch.testing.assert_close(product(9, 4), product(6, 1))
    assert not torch.isclose(product(9, 4), product(9, 3))


@pytest.mark.parametrize("r", [1, 4])
def test_a_key_depends_on_its_own_group_only(r):
    indexer, hidden = make(kv_block=r)
    cos, sin = tables(4)
    raw = indexer.project_keys(hidden)
    whole = indexer.finish_keys(raw, cos, sin)
    changed = hidden.clone()
    changed[:, 2 * r :] += 1.0

    other = indexer.finish_keys(indexer.project_keys(changed), cos, sin)

    assert torch.equal(other[:, :2], whole[:, :2])
    assert not torch.isclose(other[:, 2:], whole[:, 2:]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_raw_keys_finish_as_one(dtype):
    indexer, hidden = make(dtype, kv_block=4)
    cos, sin = tables(4, dtype=dtype)
    raw = indexer.project_keys(hidden)
    whole = indexer.finish_keys(raw, cos, sin)

    # a crop inside a group, then other tokens: the cache holds raw keys, so nothing is left of what was cut
    assert torch.equal(indexer.finish_keys(raw[:, :6], cos[:, :6], sin[:, :6]), whole[:, :1])
    assert torch.equal(indexer.finish_keys(raw[:, 4:], cos[:, 4:], sin[:, 4:]), whole[:, 1:])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7])
def test_an_incomplete_tail_has_no_key(length):
    indexer, hidden = make(kv_block=4)
    cos, sin = tables(4, length)

    assert indexer.finish_keys(indexer.project_keys(hidden[:, :length]), cos, sin).shape == (2, length // 4, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_wide_and_rounds_once(dtype):
    indexer, hidden = make(dtype, kv_block=4, heads=2)
    cos, sin = tables(4)
    exact, _ = make(torch.float64, kv_block=4, heads=2)
    exact.load_state_dict(indexer.state_dict())
    raw = indexer.project_keys(hidden)

    keys = indexer.finish_keys(raw, cos, sin)

    assert keys.dtype == raw.dtype == indexer.project_queries(hidden, cos, sin).dtype == dtype
    torch.testing.assert_close(
        keys.double(), exact.finish_keys(raw.double(), cos, sin), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_per_sequence_positions():
    indexer, hidden = make()
    cos, sin = tables(4)
    cos, sin = (torch.cat([x, x.flip(1)]) for x in (cos, sin))

    q = indexer.project_queries(hidden, cos, sin)

    torch.testing.assert_close(q[1:], indexer.project_queries(hidden[1:], cos[1:], sin[1:]))
    assert not torch.isclose(q, indexer.project_queries(hidden, *tables(4))).all()


def test_projections_have_no_bias_and_train():
    indexer, hidden = make(kv_block=4, heads=2)
    cos, sin = tables(4)
    q, k = indexer.project_queries(hidden, cos, sin), indexer.finish_keys(indexer.project_keys(hidden), cos, sin)

    (q.sum() + k.sum()).backward()

    shapes = {name: tuple(p.shape) for name, p in indexer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (16, 12), "k_proj.weight": (8, 12), "q_norm.weight": (8,), "k_norm.weight": (8,)
    }  # fmt: skip
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in indexer.parameters())


def test_finished_vectors_select():
    indexer, hidden = make(kv_block=2)
    cos, sin = tables(4)
    q, k = indexer.project_queries(hidden, cos, sin), indexer.finish_keys(indexer.project_keys(hidden), cos, sin)

    support = index_topk(q, k, budget=6, granularity=Granularity(kv_block=2))

    assert (support.keys_read()[:, 0, 6:] <= 6).all()


def test_tables_must_fit_the_indexer():
    indexer, hidden = make()
    with pytest.raises(ConfigError, match=r"has RoPE \(rotary_dim=4\): pass cos and sin"):
        indexer.project_queries(hidden)
    with pytest.raises(ConfigError, match="rotary_dim=4 columns, got 8"):
        indexer.finish_keys(indexer.project_keys(hidden), *tables(8))
    with pytest.raises(ConfigError, match="leave cos and sin out"):
        make(rotary_dim=0)[0].project_queries(hidden, *tables(4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "dim must be a whole number"),
        ({"heads": 1.0}, "heads must be a whole number"),
        ({"hidden_size": -1}, "hidden_size must be"),
        ({"kv_block": 3}, "power of two"),
        ({"rotary_dim": 3}, "rotary_dim must be even"),
        ({"rotary_dim": 66}, r"in 0\.\.64"),
        ({"features": "kq"}, "features must be one of hidden, qk"),
        ({"key_size": 0}, "key_size must be a whole number"),
        ({"reduce": "sum"}, "reduce must be one of mean, max, max_prob"),
        ({"score_dtype": "float8"}, "score_dtype must be one of"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_configuration_is_checked(fields, message):
    config = IndexerConfig(hidden_size=16)
    for name, value in fields.items():
        # past the annotations, which tests enforce and users do not
        object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=message):
        config.__post_init__()


def test_configuration_is_json():
    config = IndexerConfig(hidden_size=16, heads=4, kv_block=4, rotary_dim=16)

    assert IndexerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
