"""Raw index keys beside the KV cache of a transformers model, and what waits there to become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from topmass.errors import ConfigError, UnsupportedModelError
from topmass.integrations.transformers.index_features import LayerInputs, index_features
from topmass.selection.indexer import Indexer, LayerIndexer, index_rope

__all__ = ["CACHE_LAYERS", "IndexKeys", "KeyRows"]

# a hidden state is many times as large as the index key that is made of it: generated positions that always wait, those that
# wait at most, and the values from which the latter end; values of a short prompt
FEW_WAITING, MOST_WAITING, MOST_VALUES = 64, 256, 2**20
MOST_PROMPT_VALUES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRows:
    """Raw index keys of consecutive positions, and the RoPE tables of these positions at the indexer's width.

    The tables are kept, rather than computed again from positions, because padding shifts positions by sequence, and
    because a dynamic RoPE gives one position different tables at different lengths; the model's own cached keys keep
    the turn that they were written with, too. Only one half is stored: the other is the same.
    """

    raw: Float[Tensor, "batch len dim"]
    cos: Float[Tensor, "batch len pairs"]
    sin: Float[Tensor, "batch len pairs"]

    def __len__(self) -> int:
        return self.raw.shape[1]

    def map(self, change: Any) -> "KeyRows":
        """The same change to every tensor."""
        return KeyRows(raw=change(self.raw), cos=change(self.cos), sin=change(self.sin))

    def sequence(self, i: int, real: Bool[Tensor, " len"]) -> "KeyRows":
        """One sequence of the batch without its padding."""
        return self.map(lambda x: x[i, real][None])

    def finish(self, module: LayerIndexer) -> Float[Tensor, "batch groups dim"]:
        """Index keys of the complete groups."""
        tables = [torch.cat([x, x], -1) for x in (self.cos, self.sin)] if self.cos.shape[-1] else []
        return module.finish_keys(self.raw, *tables)


class Waiting(NamedTuple):
    """Positions whose index keys nobody has asked for: what they will be projected from, and the model's tables."""

    features: Float[Tensor, "batch len width"]
    cos: Float[Tensor, "#batch len rotary"] | None
    sin: Float[Tensor, "#batch len rotary"] | None
    # and not of a prompt
    generated: bool = True

    @property
    def positions(self) -> int:
        """How many they are."""
        return self.features.shape[1]

    def map(self, change: Any) -> "Waiting":
        """The same change to every tensor."""
        batch = self.features.shape[0]
        tables = [x if x is None else change(x.expand(batch, -1, -1)) for x in (self.cos, self.sin)]
        return Waiting(change(self.features), *tables, generated=self.generated)

    def first(self, length: int) -> "Waiting":
        """The first of them."""
        tables = [x if x is None else x[:, :length] for x in (self.cos, self.sin)]
        return Waiting(self.features[:, :length], *tables, generated=self.generated)


class _Together:
    """Generated tokens that wait at all layers of a cache at once: for each what its layers were given, and the tables.

    A token is one entry here, and not one at every layer. The layer that leaves first, as its keys change or are asked for, ends it for all.
    """

    __slots__ = ("_tables", "ended", "tokens")

    def __init__(self) -> None:
        self.tokens: list[tuple[dict[int, Tensor], Tensor | None, Tensor | None]] = []
        self.ended = False
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(self, layer: int, *, turns: bool) -> tuple[Waiting, ...]:
        """What waits at one layer, joined."""
        self.ended = True
        if not self.tokens:
            return ()
        features, cos, sin = zip(*self.tokens, strict=True)
        if turns and self._tables is None and cos[0] is not None:
            self._tables = _joined(cos), _joined(sin)
        tables = self._tables if turns and self._tables else (None, None)
        return (Waiting(torch.cat([x[layer] for x in features], 1), *tables),)


class _IndexedLayer:
    """Adds raw index keys to a cache layer, and takes them along through everything that changes its keys.

    A layer that an indexer writes to is replaced in its cache by an instance of a subclass with this in front, which takes
    over its attributes; outside topmass it behaves as before. Attributes of the layer are copied with it, and overridden methods are called by whoever calls them, so that
    a cache that is cropped, reordered, repeated or deep-copied, inside the block or not, keeps rows that fit its keys. A
    table on the side could not: a reordered layer shows nowhere how it was reordered.
    """

    index_rows: KeyRows | None = None
    # positions after those of `index_rows`: a short prompt, generated ones
    index_waiting: tuple[Waiting, ...] = ()
    # tokens after those, of all layers; the layer's number, and whether it uses RoPE
    index_together: _Together | None = None
    index_place: tuple[int, bool] = -1, False
    index_owner: str = ""

    @property
    def index_seen(self) -> int:
        """Positions that have an index key, or wait for one."""
        rows = 0 if self.index_rows is None else len(self.index_rows)
        together = 0 if self.index_together is None else len(self.index_together.tokens)
        return rows + together + sum(x.positions for x in self.index_waiting)

    def index_alone(self) -> tuple[Waiting, ...]:
        """All that waits, from now on at this layer alone."""
        if (together := self.index_together) is not None:
            layer, turns = self.index_place
            self.index_waiting, self.index_together = (*self.index_waiting, *together.of(layer, turns=turns)), None
        return self.index_waiting

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.index_alone()
        self.index_rows, self.index_waiting = None, ()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        # whether the argument says what to keep or what to remove differs between versions
        left = kept = self.get_seq_length()  # type: ignore[attr-defined]
        if self.index_rows is not None:
            left -= len(self.index_rows)
            self.index_rows = self.index_rows.map(lambda x: x[:, :kept])
        waiting = []
        for x in self.index_alone():
            if left > 0:
                waiting.append(x if x.positions <= left else x.first(left))
            left -= x.positions
        self.index_waiting = tuple(waiting)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda x: x[indices, ...])

    def _change(self, change: Any) -> None:
        if self.index_rows is not None:
            self.index_rows = self.index_rows.map(change)
        self.index_waiting = tuple(x.map(change) for x in self.index_alone())


class _IndexedDynamicLayer(_IndexedLayer, DynamicLayer):
    pass


class _IndexedHybridLayer(_IndexedLayer, LinearAttentionAndFullAttentionLayer):
    pass


_INDEXED: dict[type, type] = {
    DynamicLayer: _IndexedDynamicLayer,
    LinearAttentionAndFullAttentionLayer: _IndexedHybridLayer,
}
CACHE_LAYERS = (*_INDEXED, *_INDEXED.values())


def _joined(tables: Sequence[Tensor]) -> Tensor:
    """Tables of consecutive positions, as wide as the batch where one of them is."""
    batch = max(x.shape[0] for x in tables)
    return torch.cat([x.expand(batch, -1, -1) for x in tables], 1)


def _full(waiting: Sequence[Waiting], more: int, features: Tensor) -> bool:
    """Whether as many generated positions wait as may, by what one has."""
    count = more + sum(x.positions for x in waiting if x.generated)
    return count >= MOST_WAITING or (count >= FEW_WAITING and count * features.numel() >= MOST_VALUES)


def _indexed(layer: Any) -> Any:
    # a change of `__class__` would do, but CPython refuses it for a class with two bases
    new = object.__new__(_INDEXED[type(layer)])
    new.__dict__ = layer.__dict__
    return new


class IndexKeys:
    """Serves one indexer while a model runs: writes its raw keys, and gives its queries and keys on demand.

    Args:
        defer: Let a short prompt that is left to the model's own attention, and generated positions, wait for the next prompt
            chunk, or for `MOST_WAITING` generated ones (`FEW_WAITING` if they are large), and project them together: launches are
            most of what an indexer costs there.
    """

    def __init__(self, indexer: Indexer, *, defer: bool = False) -> None:
        self._indexer, self._defer = indexer, defer
        self._owner = indexer.digest
        self._placed: dict[int, LayerIndexer | None] = {}
        # by the identity of tensors, which are held so that it stays theirs
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor, tuple[Tensor, ...]]] = {}
        self._joined: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    def begin_forward(self) -> None:
        """A new forward of the model starts: forget what the layers of the last one shared."""
        self._tables.clear()
        self._joined.clear()

    def check_cache(self, cache: Any, layer: int) -> None:
        """Refuse a cache with positions that this indexer has not seen, before anything is written to it.

        Raises:
            ConfigError: Positions were cached outside of the block, or with another indexer.
        """
        if layer not in self._indexer.info.layers or layer >= len(cache.layers):
            return
        past = cache.layers[layer].get_seq_length()
        seen = getattr(cache.layers[layer], "index_seen", 0)
        if past and seen != past:
            raise ConfigError(
                f"The cache holds {past} positions of layer {layer}, but index keys for {seen}: an indexer has to see every "
                "position, so begin the prompt, with an empty cache, inside the block of this indexer."
            )
        if past and cache.layers[layer].index_owner != self._owner:
            raise ConfigError(
                "The cache holds the index keys of another indexer; begin the prompt, with an empty cache, inside this block."
            )

    @cached_property
    def reads_hidden(self) -> bool:
        """Whether hidden states are all that the indexer reads."""
        return all(config.features == "hidden" for config in self._indexer.info.layers.values())

    def key_features(
        self,
        layer: int,
        inputs: LayerInputs,
        q: Float[Tensor, "batch q_len q_heads head_dim"],
        k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    ) -> Float[Tensor, "batch q_len k_width"]:
        """What raw keys of the new positions are projected from."""
        module = self._module(layer, inputs.hidden)
        if module is None or module.config.features == "hidden":
            return inputs.hidden
        # a copy, as it may wait while the cache goes on
        return index_features("qk", inputs, q, k[:, k.shape[1] - q.shape[1] :].detach())[1].clone()

    def wait(
        self,
        held: Any,
        features: Float[Tensor, "batch 1 k_width"],
        cos: Float[Tensor, "#batch 1 rotary"] | None,
        sin: Float[Tensor, "#batch 1 rotary"] | None,
    ) -> bool:
        """Let a generated position wait at its layer's cache; false if its key has to be written.

        Args:
            held: The layer of the cache. One that was never indexed has no indexer, and nothing to write.
            features: What `key_features` gives for the position.
            cos: The model's RoPE there, as in `LayerInputs`.
            sin: Likewise.
        """
        if not isinstance(held, _IndexedLayer):
            return True
        waiting = held.index_alone()
        if not self._defer or _full(waiting, 0, features):
            return False
        held.index_waiting = (*waiting, Waiting(features.detach(), cos, sin))
        return True

    def wait_together(
        self,
        cache: Any,
        features: dict[int, Float[Tensor, "batch 1 k_width"]],
        tables: tuple[Tensor | None, Tensor | None],
        turns: Mapping[int, bool],
    ) -> bool:
        """Let a generated token wait at the caches of all layers; false if each has to be asked by `wait`.

        Args:
            features: What `key_features` gives for the position, by layer.
            tables: The model's RoPE there, for the layers that use it.
            turns: Which do.
        """
        layer, first = next(iter(features.items()))
        # in one forward gradients are kept for all, or for none
        if not self._defer or first.requires_grad or features.keys() != self._indexer.info.layers.keys():
            return False
        together: _Together | None = getattr(cache.layers[layer], "index_together", None)
        if together is None or together.ended:
            held = {i: cache.layers[i] for i in features}
            if not all(isinstance(x, _IndexedLayer) for x in held.values()):
                return False
            together = _Together()
            for i, x in held.items():
                x.index_alone()
                x.index_together, x.index_place = together, (i, turns[i])
        if _full(cache.layers[layer].index_waiting, len(together.tokens), first):
            return False
        together.tokens.append((features, *tables))
        return True

    def extend(
        self,
        layer: int,
        inputs: LayerInputs,
        features: Float[Tensor, "batch q_len k_width"],
        kv_len: int = 0,
        *,
        later: bool = False,
    ) -> KeyRows | None:
        """Write the raw keys of the new positions behind those that the cache has; returns those of all positions.

        `None` where no indexer serves, and where the new positions wait.

        Args:
            features: What `key_features` gives for the new positions.
            kv_len: Keys that the layer attends to, where that is known.
            later: Nobody asks for the keys of a prompt now, so that a short one may wait.

        Raises:
            UnsupportedModelError: The layer has keys of other positions, and no cache to keep index keys in.
        """
        if layer not in self._indexer.info.layers:
            return None
        cache: Any = inputs.cache
        if cache is None and kv_len > features.shape[1]:
            raise UnsupportedModelError(
                f"The layer received {kv_len} keys for {features.shape[1]} positions without a cache."
            )
        if cache is None:
            return self._rows(layer, inputs, features, None)
        held: Any = cache.layers[layer]
        if not isinstance(held, _IndexedLayer):
            held = cache.layers[layer] = _indexed(held)
        held.index_owner = self._owner
        if features.shape[1] == 1 and held.index_seen and self.wait(held, features, inputs.cos, inputs.sin):
            return None
        if later and self._defer and not held.index_alone() and features.numel() <= MOST_PROMPT_VALUES:
            held.index_waiting = (Waiting(features.detach(), inputs.cos, inputs.sin, features.shape[1] == 1),)
            return None
        held.index_rows = rows = self._rows(layer, inputs, features, held)
        held.index_waiting = ()
        return rows

    @torch.no_grad()
    def _rows(self, layer: int, inputs: LayerInputs, features: Tensor, held: Any) -> KeyRows:
        """Raw keys and tables of what the cache has, of what waits there, and of the new positions."""
        module = self._module(layer, inputs.hidden)
        assert module is not None
        before: KeyRows | None = None if held is None else held.index_rows
        cos, sin = inputs.cos, inputs.sin
        if held is not None and (waiting := held.index_alone()):
            features = torch.cat([*(x.features for x in waiting), features], 1)
            cos = self._after([x.cos for x in waiting], cos)
            sin = self._after([x.sin for x in waiting], sin)
        raw = module.project_keys(features)
        tables = self._rope(module, cos, sin, len(raw), shared=inputs.shared)
        cos, sin = tables[2:] or [raw.new_zeros(*raw.shape[:2], 0)] * 2
        if before is not None:
            raw = torch.cat([before.raw, raw], 1)
            cos, sin = self._join(before.cos, cos), self._join(before.sin, sin)
        return KeyRows(raw=raw, cos=cos, sin=sin)

    @torch.no_grad()
    def vectors(
        self,
        layer: int,
        inputs: LayerInputs,
        rows: KeyRows,
        q: Float[Tensor, "batch q_len q_heads head_dim"],
        k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    ) -> tuple[Float[Tensor, "batch q_len heads dim"], Float[Tensor, "batch groups dim"]]:
        """Index queries of the new positions, and index keys of all complete groups."""
        module = self._module(layer, inputs.hidden)
        assert module is not None
        features, _ = index_features(module.config.features, inputs, q, k[:, k.shape[1] - q.shape[1] :])
        tables = self._rope(module, inputs.cos, inputs.sin, len(features), shared=inputs.shared)
        return module.project_queries(features, *tables[:2]), rows.finish(module)

    def _rope(
        self, module: LayerIndexer, cos: Tensor | None, sin: Tensor | None, batch: int, *, shared: bool
    ) -> tuple[Tensor, ...]:
        """Tables for queries, and the half of each that is kept with keys; the layers of a forward share them."""
        dim = module.config.rotary_dim
        if cos is None or sin is None or not dim:
            return ()
        key = id(cos), id(sin), dim
        if key in self._tables:
            return self._tables[key][2]
        tables = index_rope(cos, sin, dim)
        halves = [x[..., : dim // 2].expand(batch, -1, -1) for x in tables]
        found = (*tables, *halves)
        # what was cut out of a padded batch is another tensor in every layer
        if shared:
            self._tables[key] = cos, sin, found
        return found

    def _after(self, waiting: Sequence[Tensor | None], new: Tensor | None) -> Tensor | None:
        """The model's tables of the positions that waited, and of the new ones."""
        tables = [x for x in (*waiting, new) if x is not None]
        return self._join(*tables) if tables else None

    def _join(self, *tables: Tensor) -> Tensor:
        """Tables of all positions; while no layer's cache was changed apart from the others', all layers keep one tensor."""
        key = tuple(map(id, tables))
        if key not in self._joined:
            self._joined[key] = tables, _joined(tables)
        return self._joined[key][1]

    def _module(self, layer: int, like: Tensor) -> LayerIndexer | None:
        if layer not in self._placed:
            self._placed[layer] = self._indexer.served(layer, like.device, like.dtype)
        return self._placed[layer]
