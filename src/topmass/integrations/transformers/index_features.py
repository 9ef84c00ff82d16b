"""What an indexer reads from a transformers model: its widths, hidden states or queries and keys, and RoPE tables.

Trainer and server share the functions here, so that what was trained is what is served.
"""

import hashlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from topmass.errors import ConfigError
from topmass.integrations.transformers.families import family_of, find_layers
from topmass.selection.indexer import Indexer, IndexerConfig, ModelFingerprint, rotary_width, unrotate_half_split

__all__ = ["LayerInputs", "RopeInfo", "check_indexer", "describe_model", "index_configs", "index_features"]


# what a decoder's attention weights were when they were sampled, and the digest
_SAMPLED: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, Sequence[Any], str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeInfo:
    """RoPE of one layer.

    Attributes:
        rotary_dim: Leading dimensions of a head that the model turns; 0 without RoPE.
    """

    rotary_dim: int

    def index_dim(self, dim: int) -> int:
        """`rotary_dim` of an indexer of width `dim` for this layer."""
        return min(self.rotary_dim, dim // 2 * 2)


def describe_model(model: nn.Module) -> tuple[ModelFingerprint, dict[int, RopeInfo]]:
    """Fingerprint of `model`, and the RoPE of its full-attention layers.

    Raises:
        UnsupportedModelError: The architecture is not known, or has no full-attention layer.
    """
    decoder, layers = find_layers(model)
    fingerprint = _fingerprint(decoder, layers)
    family, width = family_of(decoder), rotary_width(fingerprint)
    return fingerprint, {i: RopeInfo(rotary_dim=width if family.uses_rope(m) else 0) for i, m in sorted(layers.items())}


def index_configs(model: nn.Module, *, dim: int = 64, **settings: Any) -> dict[int, IndexerConfig]:
    """Configuration of an indexer for every full-attention layer of `model`.

    Args:
        dim: Width of an index query or key.
        settings: Other fields of `IndexerConfig`; widths and `rotary_dim` follow from the model.

    Raises:
        ConfigError: A setting is out of range.
        UnsupportedModelError: The architecture is not known, or has no full-attention layer.
    """
    fingerprint, rope = describe_model(model)
    width, key_width = fingerprint.hidden_size, None
    if settings.get("features") == "qk":
        width, key_width = (n * fingerprint.head_dim for n in (fingerprint.q_heads, fingerprint.kv_heads))
    return {
        i: IndexerConfig(
            **{"hidden_size": width, "key_size": key_width, "dim": dim, "rotary_dim": info.index_dim(dim), **settings}
        )
        for i, info in rope.items()
    }


def check_indexer(indexer: Indexer, decoder: PreTrainedModel, layers: Mapping[int, nn.Module]) -> None:
    """Refuse an indexer of another model; warn where the model may be a fine-tune of the indexer's.

    Args:
        decoder: With `layers` what `find_layers` gives for the model.

    Raises:
        ConfigError: The model has another shape.
    """
    fingerprint = _fingerprint(decoder, layers)
    mine = indexer.info.fingerprint
    if reason := mine.refusal(fingerprint):
        name = f" ({indexer.info.model})" if indexer.info.model else ""
        raise ConfigError(
            f"This indexer belongs to another model{name}: {reason}; load that model, or distil an indexer for this one."
        )
    if reason := mine.doubt(fingerprint):
        warnings.warn(
            f"The model is not the one that the indexer was trained on ({reason}); if it is a fine-tune, check the recall.",
            stacklevel=4,
        )


def _fingerprint(decoder: PreTrainedModel, layers: Mapping[int, nn.Module]) -> ModelFingerprint:
    weights = [w for _, m in sorted(layers.items()) for _, w in sorted(m.named_parameters())]
    # to read them anew for every prompt would cost more than to check that they are the same
    marks = None if any(w.is_inference() for w in weights) else [(id(w), w.data_ptr(), w._version) for w in weights]
    kept = _SAMPLED.get(decoder)
    if (
        kept is None
        or marks is None
        or kept[0] != marks
        or any(r() is not w for r, w in zip(kept[1], weights, strict=True))
    ):
        kept = marks, [weakref.ref(w) for w in weights], _sample(weights)
        _SAMPLED[decoder] = kept
    return ModelFingerprint.from_config(decoder.config, tuple(layers), weights=kept[2])


def _sample(weights: Sequence[Tensor]) -> str:
    """Digest of the first values of the attention weights, which fine-tuning changes and a change of dtype does not."""
    parts = [
        weight.detach().reshape(-1)[:64].to(torch.bfloat16)
        for weight in weights
        if weight.is_floating_point() and not weight.is_meta
    ]
    if not parts:
        return ""
    # one copy to the host unless the layers are spread over devices
    together = len({x.device for x in parts}) == 1
    values = torch.cat(parts if together else [x.cpu() for x in parts]).cpu().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]


@dataclass(slots=True, kw_only=True)
class LayerInputs:
    """What a full-attention module was called with, for the positions of its queries.

    Attributes:
        hidden: Attention input, after the layer's norm.
        cos: Cosines of the model's RoPE at these positions; `None` without RoPE.
        sin: Sines, likewise.
        cache: The model's cache, if it has one.
        pairs: Which dimensions of a head the tables turn together: `"halves"` or `"neighbours"`.
        shared: Whether other layers of the forward may receive the same tables.
    """

    hidden: Float[Tensor, "batch q_len hidden"]
    cos: Float[Tensor, "#batch q_len rotary"] | None
    sin: Float[Tensor, "#batch q_len rotary"] | None
    cache: Any = None
    pairs: str = "halves"
    shared: bool = True

    def sequence(self, i: int, rows: Bool[Tensor, " q_len"]) -> "LayerInputs":
        """One sequence of the batch without its padding."""
        tables = [x if x is None else x[i if x.shape[0] > 1 else 0, rows][None] for x in (self.cos, self.sin)]
        return replace(self, hidden=self.hidden[i, rows][None], cos=tables[0], sin=tables[1], shared=False)


def index_features(
    features: str,
    inputs: LayerInputs,
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch q_len kv_heads head_dim"],
) -> tuple[Float[Tensor, "batch q_len q_width"], Float[Tensor, "batch q_len k_width"]]:
    """What an indexer's queries and its raw keys are projected from, for the same positions.

    Args:
        features: `"hidden"` or `"qk"`, as in `IndexerConfig`.
        inputs: What the attention module received.
        q: The layer's queries after norm and RoPE, for the same positions.
        k: The layer's keys, likewise.
    """
    if features == "hidden":
        return inputs.hidden, inputs.hidden
    if inputs.cos is not None and inputs.sin is not None:
        cos, sin = inputs.cos[:, :, None], inputs.sin[:, :, None]
        q, k = (_unrotate(x, cos, sin, inputs.pairs) for x in (q, k))
    return q.flatten(2), k.flatten(2)


def _unrotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    if pairs == "halves":
        return unrotate_half_split(x, cos, sin)
    width = cos.shape[-1]
    halves = torch.cat([x[..., 0:width:2], x[..., 1:width:2], x[..., width:]], -1)
    halves = unrotate_half_split(halves, cos, sin)
    turned = torch.stack([halves[..., : width // 2], halves[..., width // 2 : width]], -1)
    return torch.cat([turned.flatten(-2), halves[..., width:]], -1)
