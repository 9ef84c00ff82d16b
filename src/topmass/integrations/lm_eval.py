"""lm-evaluation-harness: any of its tasks under any selector.

    python -m topmass.integrations.lm_eval run --model topmass --model_args pretrained=MODEL,selector=indexer,indexer=DIR,budget=2048 ...

takes the arguments of `lm_eval`, whose models come from its own list only; importing this module adds `topmass` to that list for
programs that call `lm_eval.simple_evaluate`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from topmass.errors import ConfigError
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.reference import REFERENCE
from topmass.integrations.transformers.sparsify import Decode, sparsify
from topmass.selection import Selector
from topmass.selection.saved import load_selector, make_selector

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "topmass.integrations.lm_eval needs lm-evaluation-harness: in a clone of topmass, pip install '.[lm-eval]'",
        name="lm_eval",
    ) from error

__all__ = ["TopmassLM", "main"]

_SETTINGS = (
    "budget", "q_block", "kv_block", "share", "sink", "window", "dense_below", "pool", "seed", "indexer", "indexer_digest",
)  # fmt: skip


@register_model("topmass")
class TopmassLM(HFLM):
    """A transformers model of the harness whose full-attention layers read what a selector chooses.

    Prompts are sparse. Generated tokens are dense unless `decode=sparse`; a scored continuation is part of the prompt it is
    scored in, hence sparse.

    Args:
        pretrained: As for the harness's `hf`; `reference` is the checkpoint that ships with topmass.
        selector: `dense`, `streaming`, `indexer`, `pooled`, `oracle`, `random`, or a TOML file of `topmass frontier`.
        kernel: Kernel backend of the sparse attention; `backend` is the harness's own.
        decode: `dense` or `sparse`.
        kwargs: Settings of the selector (`budget`, `indexer`, `q_block`, `kv_block`, `share`, `sink`, `window`, `dense_below`,
            `pool`, `seed`), and whatever else `hf` takes.

    Raises:
        ConfigError: A setting is wrong, or has no effect beside a TOML file.
    """

    def __init__(
        self,
        pretrained: str,
        selector: str = "dense",
        kernel: str = "auto",
        decode: Decode = "dense",
        **kwargs: Any,
    ) -> None:
        # before the model is loaded, which takes minutes
        settings = {key: kwargs.pop(key) for key in _SETTINGS if key in kwargs}
        self.selector = _selector(selector, settings)
        self._kernel, self._decode = kernel, decode
        self._keys, self._calls, self._ran = 0.0, 0, set[str]()
        super().__init__(pretrained=str(REFERENCE) if pretrained == "reference" else pretrained, **kwargs)

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        with fast_linear_attention(self.model), sparsify(
            self.model, self.selector, backend=self._kernel, decode=self._decode
        ) as run:  # fmt: skip
            yield
        keys = run.receipt.keys_read_mean
        # a call of generated tokens alone reads no support
        if not math.isnan(keys):
            self._keys, self._calls = self._keys + keys, self._calls + 1
        self._ran.add(run.receipt.kernels)

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._sparse():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._sparse():
            return super()._model_generate(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        info = super().get_model_info()
        mean = self._keys / self._calls if self._calls else None
        return info | {
            "topmass_selector": self.selector.config(),
            "topmass_fingerprint": self.selector.fingerprint,
            "topmass_decode": self._decode,
            "topmass_kernels": sorted(self._ran),
            # mean over calls, not over tokens
            "topmass_keys_read_mean": mean,
        }


def _selector(name: str, settings: dict[str, Any]) -> Selector:
    if not name.endswith(".toml"):
        return make_selector({"name": name, **settings}, source="model_args")
    if settings:
        raise ConfigError(f"{name} says how keys are chosen; leave {', '.join(settings)} out of model_args.")
    return load_selector(Path(name))


def main() -> None:
    """The harness's own command line, with `topmass` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
