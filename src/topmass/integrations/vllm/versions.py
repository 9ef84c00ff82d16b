"""Everything that touches vLLM where its versions differ, or where no public hook exists: 0.26 to 0.32.

| what | 0.26, 0.27 | 0.28 and newer |
|---|---|---|
| width of a page's rows | `AttentionBackend.get_kv_cache_shape` | `FullAttentionSpec.head_size_v` alone |
| text-only Qwen3.5 | not in the registry, no `IsHybrid`, its configuration not prepared | in the registry |
| model runner | V1 (`input_batch`) for hybrids, V2 (`req_states`) for dense models | V2 from 0.30 |
| keeping a batch out of full graphs | V1: yes; V2: no, so none are used | yes |

No version tells an attention backend how long a request's prompt is, or which request a row belongs to; both runners know it,
and are asked in a wrapper around one of their methods.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from topmass.errors import ConfigError, TopmassError, UnsupportedModelError
from topmass.integrations.vllm.batch import Step
from topmass.integrations.vllm.metrics import Counters, expose
from topmass.integrations.vllm.pages import PageLayout
from topmass.integrations.vllm.service import Service, open_service
from topmass.integrations.vllm.settings import Settings
from topmass.selection.indexer import ModelFingerprint

__all__ = [
    "FLOOR",
    "MODELS",
    "check_engine",
    "hold",
    "kv_cache_use",
    "open_engine",
    "register",
    "run_attention",
    "service_of",
    "wants_floor",
    "whole_pages",
]

_PACKAGE = "topmass.integrations.vllm"
MODELS = {
    "LlamaForCausalLM": f"{_PACKAGE}.models.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": f"{_PACKAGE}.models.qwen3:Qwen3ForCausalLM",
    "Qwen3NextForCausalLM": f"{_PACKAGE}.models.qwen3_next:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": f"{_PACKAGE}.models.qwen3_5:Qwen3_5ForCausalLM",
}
"""Class of ours by architecture, as `config.json` names it."""

FLOOR = "topmass_floor"
"""Key of `--additional-config` that replaces the attention of prompts by a copy of the values: a bound for benchmarks."""

_HELD = "_topmass_service"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"


def register() -> None:
    """Backend, model classes, and the checks at start-up; may be called again."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    cpu = current_platform.is_cpu()
    path = f"{_PACKAGE}.backend_reference.ReferenceBackend" if cpu else f"{_PACKAGE}.backend_flash.SparseFlashBackend"
    register_backend(AttentionBackendEnum.CUSTOM, path)
    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)
    _prepare_text_only()
    platform = type(current_platform)
    _wrap(platform, "check_and_update_config", _check_after)
    if cpu:
        _wrap(platform, "get_attn_backend_cls", functools.partial(_let_choose, AttentionBackendEnum.CUSTOM))


def _prepare_text_only() -> None:
    """Have a text-only Qwen3.5's configuration prepared: the state's dtype as the model says, positions of one dimension."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    whole: Any = MODELS_CONFIG_MAP.get("Qwen3_5ForConditionalGeneration")
    if whole is None or "Qwen3_5ForCausalLM" in MODELS_CONFIG_MAP:
        return

    class TextOnly(whole):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            whole.verify_and_update_config(vllm_config)
            rope = getattr(vllm_config.model_config.hf_text_config, "rope_parameters", None) or {}
            for name in ("mrope_section", "mrope_interleaved"):
                rope.pop(name, None)

    MODELS_CONFIG_MAP["Qwen3_5ForCausalLM"] = TextOnly


def open_engine(vllm_config: Any) -> Service | None:
    """A new service for an engine, or `None` if it serves no indexer.

    Raises:
        ConfigError: A setting is wrong, or does not fit the indexer.
        DataError: The indexer is missing or damaged.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    return open_service(
        vllm_config.additional_config,
        device=current_platform.get_device_name(),
        say=init_logger("vllm.topmass").info,
        keep=_speaks(vllm_config),
    )


def _speaks(vllm_config: Any) -> bool:
    """True for one rank of a tensor-parallel group, all of which do the same."""
    parallel = vllm_config.parallel_config
    return getattr(parallel, "rank", 0) % max(parallel.tensor_parallel_size, 1) == 0


def service_of(vllm_config: Any) -> Service | None:
    """The service that the model of this engine was built with, or `None` if it serves no indexer."""
    held = vars(vllm_config).get(_HELD)
    if held is None and Settings.parse(vllm_config.additional_config) is not None:
        # to go on would be to serve dense in silence
        raise UnsupportedModelError(
            "vLLM built this model, or asks for its attention, without topmass; please report it."
        )
    return held


def wants_floor(vllm_config: Any) -> bool:
    """True for an engine that copies values in the place of the attention of prompts.

    Raises:
        ConfigError: It is to serve an indexer, too.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or not additional.get(FLOOR):
        return False
    if "topmass" in additional:
        raise ConfigError(
            f"'{FLOOR}' in --additional-config computes no attention to serve sparse; leave it or 'topmass' out."
        )
    return True


def _check_family(vllm_config: Any) -> None:
    architectures = list(getattr(vllm_config.model_config.hf_config, "architectures", None) or [])
    if not set(architectures) & set(MODELS):
        raise UnsupportedModelError(
            f"topmass does not serve {', '.join(architectures) or 'this model'} in vLLM; it serves {', '.join(sorted(MODELS))}. "
            "Leave 'topmass' out of --additional-config to serve it dense."
        )


def check_engine(vllm_config: Any, service: Service) -> None:
    """Refuse an engine that cannot serve its indexer exactly.

    Raises:
        ConfigError: An option of vLLM's is in the way, or the indexer does not fit the model.
        UnsupportedModelError: No class of ours serves the model.
    """
    _check_family(vllm_config)
    model = vllm_config.model_config
    backends = vllm_config.attention_config
    chosen = (getattr(backends, "backend_per_kind", None) or {}).get("full_attention") or backends.backend
    if chosen is None or chosen.name != "CUSTOM":
        raise ConfigError(
            f"The attention backend is {chosen.name if chosen else 'left to vLLM'}; an indexer is served by ours: add "
            "--attention-backend CUSTOM, or leave 'topmass' out of --additional-config."
        )
    if (dtype := str(vllm_config.cache_config.cache_dtype)) not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"The KV cache is {dtype}, the model {model.dtype}: index keys ride in the KV cache, in the model's dtype; leave "
            "--kv-cache-dtype at 'auto'."
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "Speculative decoding cannot be combined with topmass yet; leave --speculative-config out, or 'topmass' out of "
            "--additional-config."
        )
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        raise ConfigError(
            "A KV connector may cut pages by heads or tokens, where index keys lie behind all of them, and names none of the indexer's "
            "settings; leave --kv-transfer-config out, or 'topmass' out of --additional-config."
        )
    parallel = vllm_config.parallel_config
    if getattr(parallel, "use_ubatching", False):
        raise ConfigError(
            "Micro-batches (--enable-dbo, --ubatch-size) split a step's requests after topmass was told of them; leave them out."
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} > 1 splits a sequence's keys between devices, where none could select; use 1.")
    service.check(ModelFingerprint.from_config(model.hf_text_config))


def hold(backend: Any, layout: PageLayout, vllm_config: Any, service: Service) -> None:
    """Make room for index keys, and begin to ask the model runner about requests, on behalf of the model of this engine.

    Args:
        backend: Attention backend of the layers.
    """
    # from now on the indexer's files may change or go
    vars(vllm_config)[_HELD] = service
    backend.index_columns = layout.columns
    # the graph that is compiled depends on the indexer's shape, which its directory's name does not tell
    vllm_config.additional_config["topmass_indexer"] = service.indexer.digest
    guarded = {name: _ask(sys.modules[name].GPUModelRunner) for name in (_V1, _V2) if name in sys.modules}
    # the one of an engine before this one may be loaded, too
    own = _V2 if getattr(vllm_config, "use_v2_model_runner", False) else _V1
    service.guarded = guarded.get(own, all(guarded.values()))
    if not service.guarded:
        service.tell(
            "topmass: this version's model runner cannot keep a batch out of the CUDA graphs of decoding, so there will be "
            "no full ones; VLLM_USE_V2_MODEL_RUNNER=0 takes the other runner, which can."
        )
    if _speaks(vllm_config):
        names = vllm_config.model_config.served_model_name
        engine = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
        # vLLM's own labels
        service.counters = Counters.here(
            {"model_name": names if isinstance(names, str) else str(names[0]), "engine": str(engine)}
        )


def kv_cache_use(engine: Any) -> tuple[float, int]:
    """Share of the KV cache that requests hold now, and the same in bytes, of an `LLMEngine` whose core is in this process."""
    scheduler = engine.engine_core.engine_core.scheduler
    pool, groups = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config.kv_cache_groups
    # one block is never given to a request; a block of each group is as large as the largest
    used, total = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
    size = max((g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups), default=0)
    return used / total, used * size


def whole_pages() -> tuple[Any, ...] | None:
    """Orders of the KV cache's memory in which a page is one piece; `None` where vLLM knows no others."""
    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ModuleNotFoundError:
        return None
    return tuple(KVCacheLayout[name] for name in ("LBNHC", "LBHNC", "BLNHC", "BLHNC"))


def run_attention(attn: Any, query: Any, key: Any, value: Any, out: Any) -> None:
    """Write to the pages, then attend, through the operators that `torch.compile` splits the graph at."""
    import torch
    from vllm.model_executor.layers.attention import attention as module

    if attn.use_direct_call:
        written = module.unified_kv_cache_update(key, value, attn.layer_name)
        module.unified_attention_with_output(query, key, value, out, attn.layer_name, kv_cache_dummy_dep=written)
        return
    name = module._encode_layer_name(attn.layer_name)
    written = torch.ops.vllm.unified_kv_cache_update(key, value, name)
    torch.ops.vllm.unified_attention_with_output(query, key, value, out, name, kv_cache_dummy_dep=written)


def _check_after(original: Callable[..., Any], vllm_config: Any) -> None:
    original(vllm_config)
    # before anything is loaded, in the process that the user started
    if vllm_config.model_config is None:
        return
    try:
        if wants_floor(vllm_config):
            _check_family(vllm_config)
        if (service := open_engine(vllm_config)) is not None:
            check_engine(vllm_config, service)
            expose()
    except TopmassError as error:
        if _is_command():
            # one line in the place of pydantic's, asyncio's and vLLM's own frames
            sys.exit(f"topmass: error: {error}")
        raise


def _is_command() -> bool:
    """True in a process that was started as `vllm` or `python -m vllm...`: nobody there could catch an error."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and spec.name.startswith("vllm."))


def _let_choose(custom: Any, original: Callable[..., Any], selected: Any, *args: Any, **kwargs: Any) -> Any:
    # the CPU platform knows one backend and ignores what was asked for
    return custom.get_path() if selected is custom else original(selected, *args, **kwargs)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, ...)` in the place of a class method, once."""
    original = getattr(owner, name)
    if getattr(original, "topmass", False):
        return

    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    method.topmass = True  # pyright: ignore[reportFunctionMemberAccess]
    setattr(owner, name, classmethod(method))


def _ask(runner: type) -> bool:
    """Have a class of model runners tell each step's requests to its service.

    Returns:
        True if it can also be asked to keep a batch out of the CUDA graphs of decoding.
    """
    around = {"execute_model": _execute_model}
    if hasattr(runner, "prepare_inputs"):
        around |= {"prepare_inputs": _prepare_inputs, "gather_batch_req_state": _gather_batch_req_state}
    else:
        around |= {
            "_build_attention_metadata": _build_attention_metadata,
            "_determine_batch_execution_and_padding": _determine_batch_execution,
        }
    guard = list(around)[-1]
    for name, function in around.items():
        original = getattr(runner, name, None)
        if original is None and name != guard:
            raise UnsupportedModelError(
                f"This version of vLLM has no {runner.__name__}.{name}, which topmass asks for prompt lengths; use 0.26 to 0.32."
            )
        if original is not None and not getattr(original, "topmass", False):
            setattr(runner, name, _around(original, function))
    return hasattr(runner, guard)


def _around(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        service = service_of(self.vllm_config)
        if service is None:
            return original(self, *args, **kwargs)
        return function(service, functools.partial(original, self), self, *args, **kwargs)

    method.topmass = True  # pyright: ignore[reportAttributeAccessIssue]
    return method


def _execute_model(service: Service, original: Any, runner: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    service.receipts.finish(scheduled.finished_req_ids)
    try:
        return original(scheduled, *args, **kwargs)
    finally:
        service.end_step()


def _prepare_inputs(service: Service, original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    batch = original(*args, **kwargs)
    lengths = runner.req_states.prompt_len.np[batch.idx_mapping_np]
    service.step = Step(requests=list(batch.req_ids), prompt_lens=lengths.tolist())
    return batch


def _gather_batch_req_state(service: Service, original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    state, uniform = original(*args, **kwargs)
    if state is None:
        return state, uniform
    past = runner.req_states.num_computed_tokens_np[state.idx_mapping_np]
    prompt = runner.req_states.prompt_len.np[state.idx_mapping_np]
    if _selects_alone(service, past, prompt):
        # a graph of decoding holds dense attention
        state.decode_graph_eligible = False
        return state, None
    return state, uniform


def _build_attention_metadata(service: Service, original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    # vLLM's own dummy runs do not say how many tokens of whom
    if kwargs.get("num_scheduled_tokens") is not None:
        batch = runner.input_batch
        lengths = batch.num_prompt_tokens[: batch.num_reqs]
        service.step = Step(requests=list(batch.req_ids), prompt_lens=lengths.tolist())
    return original(*args, **kwargs)


def _determine_batch_execution(service: Service, original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    batch = runner.input_batch
    past = batch.num_computed_tokens_cpu[: batch.num_reqs]
    # vLLM's dummy runs say themselves whether they stand for decoding
    real = "force_uniform_decode" not in kwargs
    if real and _selects_alone(service, past, batch.num_prompt_tokens[: batch.num_reqs]):
        kwargs["force_uniform_decode"] = False
    return original(*args, **kwargs)


def _selects_alone(service: Service, past: Any, prompt: Any) -> bool:
    """True if a prompt's token that comes next, maybe alone, reads a support."""
    threshold = service.threshold
    return threshold is not None and bool(((past < prompt) & (past >= threshold)).any())
