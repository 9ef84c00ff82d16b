"""What is timed of one layer: the stages of sparse attention, of the oracle and of the indexer's loss, with their checks."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from topmass.bench import gates
from topmass.bench.inputs import TILE, Inputs, select, union_growth
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.distill import indexer_kl
from topmass.ops import dense_lse, pooled_mass, sparse_prefill, tile_union, topk_support
from topmass.ops._logits import rows_that_fit

__all__ = ["Case", "Entry", "kl_case", "layer_case", "oracle_case"]

# ids and words that the union stage may hold at a time, as the kernel's launcher does
UNION_SLOTS = 2**25
# query blocks at which the KL's gradient is checked
KL_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that is timed. `flop` and `bytes` are those that the result needs, not those spent."""

    run: Callable[[], object]
    role: str
    backend: str
    flop: float | None = None
    bytes: float | None = None


@dataclass(slots=True, kw_only=True)
class Case:
    """Everything that is timed together, the check of it, and what is known of the inputs."""

    entries: dict[str, Entry]
    checks: dict[str, Callable[[], gates.Metrics]]
    facts: dict[str, tuple[float, str]] = field(default_factory=dict)


# -- the layer


def layer_case(inputs: Inputs, rule: SupportRule, backend: str) -> Case:
    """Index, union and attention of one layer, and all of it."""
    unit = rule.granularity

    def index() -> Support:
        return select(inputs.iq, inputs.ik, rule, start=0, backend=backend)

    def attend(support: Support) -> Tensor:
        return sparse_prefill(inputs.q, inputs.k, inputs.v, support, backend=backend)[0]

    support = index()
    growth = union_growth(support, backend=backend)
    index_flop, attend_flop = _index_flop(inputs, unit), _attend_flop(inputs, support)
    index_bytes, attend_bytes = _index_bytes(inputs, unit), _attend_bytes(inputs, support, growth or 1.0)
    entries = {
        "index": Entry(run=index, role="stage", backend=backend, flop=index_flop, bytes=index_bytes),
        "attend": Entry(
            run=lambda: attend(support), role="stage", backend=backend, flop=attend_flop, bytes=attend_bytes
        ),
        "layer": Entry(run=lambda: attend(index()), role="total", backend=backend, flop=index_flop + attend_flop),
    }
    if unit.q_block < TILE:
        # part of `attend`; timed alone to say how large a part
        entries["union"] = Entry(run=lambda: _unions(support, backend), role="part", backend=backend)
    facts = {"keys_read_mean": (support.keys_read().double().mean().item(), "keys/query")}
    if growth is not None:
        facts["union_growth"] = (growth, "ratio")
    return Case(
        entries=entries,
        checks={
            "index": lambda: gates.check_index(inputs, support, rule),
            "attend": lambda: gates.check_attention(inputs, support, attend(support), rule),
            "layer": lambda: _same(attend(index()), attend(support)),
        },
        facts=facts,
    )


def _same(a: Tensor, b: Tensor) -> gates.Metrics:
    if not torch.equal(a, b):
        raise AssertionError("The same inputs gave another result the second time.")
    return {}


def _unions(support: Support, backend: str) -> None:
    slots = TILE // support.granularity.q_block * max(support.groups.shape[-1], 1)
    step = max(UNION_SLOTS // slots, 1) * TILE
    for lo in range(0, support.q_len, step):
        tile_union(support.rows(lo, min(lo + step, support.q_len)), tile=TILE, backend=backend)


def _index_flop(inputs: Inputs, unit: Granularity) -> float:
    # every query against every group of its past
    n = inputs.q.shape[1]
    return inputs.iq.shape[-1] * n * (n + 1) / unit.kv_block


def _attend_flop(inputs: Inputs, support: Support) -> float:
    return 4.0 * inputs.q[0, 0].numel() * support.keys_read().double().sum().item()


def _index_bytes(inputs: Inputs, unit: Granularity) -> float:
    # a float16 score of every query block and group of its past, written and read once
    n = inputs.q.shape[1]
    return 2.0 * n * (n + 1) / (unit.kv_block * unit.q_block)


def _attend_bytes(inputs: Inputs, support: Support, growth: float) -> float:
    # keys and values of the union once a tile; queries and outputs once
    rows = 2.0 * inputs.k[0, 0].numel() * support.keys_read().double().sum().item() * growth / TILE
    return (rows + 2.0 * inputs.q.numel()) * inputs.k.element_size()


# -- the oracle


def oracle_case(inputs: Inputs, rule: SupportRule, backend: str) -> Case:
    """The exact selection by attention mass, and attention over it."""
    normaliser = _normaliser(inputs)

    def lse() -> Tensor:
        return dense_lse(inputs.q, inputs.k, inputs.v, scale=inputs.scale, backend=normaliser)[1]

    def choose(norm: Tensor) -> Support:
        return _oracle_support(inputs, norm, rule, backend)

    def attend(support: Support) -> Tensor:
        return sparse_prefill(inputs.q, inputs.k, inputs.v, support, backend=backend)[0]

    norm = lse()
    support = choose(norm)
    return Case(
        entries={
            "lse": Entry(run=lse, role="stage", backend=normaliser),
            "select": Entry(run=lambda: choose(norm), role="stage", backend=backend),
            "attend": Entry(
                run=lambda: attend(support), role="stage", backend=backend, flop=_attend_flop(inputs, support)
            ),
            "oracle": Entry(run=lambda: attend(choose(lse())), role="total", backend=backend),
        },
        checks={
            "select": lambda: gates.check_oracle(inputs, support, rule),
            "attend": lambda: gates.check_attention(inputs, support, attend(support), rule),
        },
        facts={"keys_read_mean": (support.keys_read().double().mean().item(), "keys/query")},
    )


def _normaliser(inputs: Inputs) -> str:
    """The backend of the dense normaliser."""
    return "flash2" if inputs.q.is_cuda else "reference"


def _oracle_support(inputs: Inputs, lse: Float[Tensor, "1 len q_heads"], rule: SupportRule, backend: str) -> Support:
    """Chunks of whole query blocks: mass at the granularity, then the best groups; never N x N."""
    n, unit = inputs.q.shape[1], rule.granularity
    # the mass, and what the top-k needs beside it
    step = rows_that_fit(inputs.q, n, heads=2, multiple=unit.q_block)
    parts = []
    for a in range(0, n, step):
        z = min(a + step, n)
        mass, _ = pooled_mass(
            inputs.q[:, a:z],
            inputs.k[:, :z],
            lse[:, a:z],
            scale=inputs.scale,
            granularity=unit,
            q_start=a,
            backend=backend,
        )
        parts.append(topk_support(mass, rule=rule, q_start=a, q_len=z - a, backend=backend))
    return Support.cat(parts)


# -- the indexer's loss


def kl_case(inputs: Inputs, unit: Granularity) -> Case:
    """The indexer's loss, with and without its gradient."""
    lse = dense_lse(inputs.q, inputs.k, inputs.v, scale=inputs.scale, backend=_normaliser(inputs))[1]
    iq, ik = (x.detach().clone().requires_grad_() for x in (inputs.iq, inputs.ik))

    def loss(grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            value = indexer_kl(inputs.q, inputs.k, lse, iq, ik, scale=inputs.scale, granularity=unit)
            if grad:
                torch.autograd.grad(value, (iq, ik))

    blocks = -(-inputs.q.shape[1] // unit.q_block)
    rows = torch.linspace(0, blocks - 1, min(KL_ROWS, blocks)).long().unique()
    return Case(
        entries={
            # what the rest takes is in `kl` minus this
            "loss": Entry(run=lambda: loss(False), role="part", backend="auto"),
            "kl": Entry(run=lambda: loss(True), role="total", backend="auto"),
        },
        checks={"kl": lambda: gates.check_kl(inputs, lse, unit, rows)},
    )
