"""What the recipes of this folder share: engines in this process, the reference checkpoint's prompts, and results as they come."""

import gc
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# read when vLLM is imported
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# else Inductor moves it to a folder of each engine's own, and every engine compiles vLLM's kernels again
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
# else what Inductor compiled is kept by all settings of an engine, and shared by none
os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
# workers import what lies beside this file
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# NCCL alone, so that the sums of two GPUs are the same every time
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")

import topmass
from topmass.eval.tasks import make_samples
from topmass.eval.tasks.base import Sample

ROOT = Path(topmass.__file__).parent / "assets"
REFERENCE, INDEXER = ROOT / "reference", ROOT / "reference_indexer"
KV_BYTES = 2 * 2**30
TASKS = ("niah_single", "niah_uuid", "niah_multiquery", "variable_tracking", "niah_distractor")
# few shapes to capture: the point is that graphs run, not every batch size
GRAPHS: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}


class Clock:
    """A time limit that parts of a run ask."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def used(self) -> float:
        return time.monotonic() - self.start

    def left(self, need: float = 0.0) -> bool:
        """Whether `need` seconds are still there."""
        return self.used + need < self.seconds


class Store:
    """Results by name in one JSON file, written after each."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def put(self, name: str, value: Any) -> Any:
        # of other processes that have written since
        self.found = {**self._read(), **self.found, name: value}
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self.found))
        temporary.replace(self.path)
        return value


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def engine(settings: dict[str, Any] | None, **options: Any) -> Any:
    """An engine of the reference checkpoint: with an indexer if there are settings, else vLLM's own."""
    from vllm import LLM

    # for a source tree that is not installed, whose entry point nobody finds
    from topmass.integrations.vllm import register

    register()
    extra: dict[str, Any] = {"gdn_prefill_backend": "triton"} if on_gpu() else {}
    if settings is not None:
        extra["topmass"] = {"indexer": str(INDEXER), **settings}
        options["attention_config"] = {"backend": "CUSTOM"}
    base = {
        "model": str(REFERENCE),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        # a small model, and a size that does not hang on what else is on the GPU
        "gpu_memory_utilization": 0.1,
        **({"kv_cache_memory_bytes": KV_BYTES} if on_gpu() else {}),
        "enable_prefix_caching": False,
        "max_num_seqs": 16,
        "seed": 0,
        "worker_extension_cls": "workers.Watched",
    }
    if on_gpu():
        # as transformers keeps it, whatever a version makes of a configuration that does not say
        base["mamba_ssm_cache_dtype"] = "float32"
        if not options.get("enforce_eager"):
            base["compilation_config"] = dict(GRAPHS)
    return LLM(additional_config=extra, **{**base, **options})


def close(llm: Any) -> None:
    """Give an engine's memory back."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    if on_gpu():
        import torch

        # a function of vLLM's is compiled for each engine's layers, and Dynamo counts how often
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def ran(llm: Any) -> dict[str, Any]:
    """What ran sparse, as one worker says; nothing of the kind is an error, so that no dense run passes for a sparse one."""
    found = llm.collective_rpc("topmass_ran")[0]
    assert found.get("backends"), "no sparse kernel ran"
    return found


def generate(llm: Any, prompts: Sequence[Sequence[int]], tokens: int, stop: Sequence[int] = ()) -> list[list[int]]:
    """Greedy continuations; without `stop` all of them have `tokens` tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=not stop, stop_token_ids=list(stop), detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
    return [[t for t in o.outputs[0].token_ids if t not in stop] for o in outputs]


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REFERENCE)


def stops() -> list[int]:
    """Tokens that end an answer."""
    found = json.loads((REFERENCE / "generation_config.json").read_text()).get("eos_token_id")
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def samples(
    total: int, length: int, *, tasks: Sequence[str] = TASKS, questions: int = 5, seed: int = 0
) -> list[Sample]:
    """About `total` samples of several tasks, with `questions` questions a haystack where a task has as many."""
    words, found = tokenizer(), []
    for task in tasks:
        asked = min(questions, topmass.eval.tasks.get_task(task).max_questions)
        need = -(-total // (len(tasks) * asked))
        found += make_samples(task, words, length=length, n=need, seed=seed, questions=asked)[: total // len(tasks)]
    return found


def ids_of(words: Any, batch: Iterable[Sample]) -> list[list[int]]:
    """Prompts as the evaluation makes them: context and question are tokenised apart."""
    return [words(s.context)["input_ids"] + words(s.question, add_special_tokens=False)["input_ids"] for s in batch]


def version() -> str:
    import torch
    import vllm

    device = torch.cuda.get_device_name() if on_gpu() else "cpu"
    return f"vLLM {vllm.__version__}, torch {torch.__version__}, {device}"
