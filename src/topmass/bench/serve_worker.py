"""The process behind `OfflineEngine`: an engine of vLLM without a server, driven by lines of JSON."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["drive", "main"]


def main() -> None:
    """Build the engine that the first line describes; answer each further line."""
    # the engine in this process, where its cache can be seen; read when vLLM is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options = json.loads(sys.stdin.readline())
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    from topmass.errors import TopmassError

    try:
        engine = LLM(**{"skip_tokenizer_init": True, **options}).llm_engine
    except TopmassError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    _say({})
    for line in sys.stdin:
        _say(drive(engine, **json.loads(line)))


def _say(message: Mapping[str, Any]) -> None:
    print(f"topmass {json.dumps(message)}", flush=True)  # noqa: T201 - the answer


def drive(
    engine: Any, prompts: Sequence[list[int]], moments: Sequence[float] | None, new_tokens: int
) -> dict[str, Any]:
    """Arguments of `Answers` for requests that are due at these moments, or one after the other."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    from topmass.bench.serve_engines import timing
    from topmass.integrations.vllm.versions import kv_cache_use

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    due = [] if moments is None else [start + moment for moment in moments]
    marks: dict[str, list[float]] = {}
    tokens, cached, sent, usage, memory = dict.fromkeys(map(str, range(len(prompts))), 0), 0, 0, 0.0, 0.0
    while sent < len(prompts) or engine.has_unfinished_requests():
        now, busy = time.perf_counter(), engine.has_unfinished_requests()
        while sent < len(prompts) and (due[sent] <= now if moments is not None else not busy):
            if moments is None:
                due.append(time.perf_counter())
            engine.add_request(str(sent), {"prompt_token_ids": prompts[sent]}, sampling)
            sent, busy = sent + 1, True
        if not busy:
            time.sleep(max(0.0, due[sent] - time.perf_counter()))
            continue
        outputs = engine.step()
        now = time.perf_counter()
        share, size = kv_cache_use(engine)
        usage, memory = max(usage, share), max(memory, size)
        for out in outputs:
            # ids may carry a suffix of the engine's
            name = out.request_id.split("-")[0]
            count = len(out.outputs[0].token_ids)
            if count > tokens[name]:
                marks.setdefault(name, [now, now])[1] = now
                tokens[name] = count
            if out.finished:
                cached += out.num_cached_tokens or 0
    order = [str(i) for i in range(len(prompts))]
    return {
        "requests": [timing(due[int(i)], marks[i][0], marks[i][1], tokens[i]) for i in order],
        "seconds": max(m[1] for m in marks.values()) - start,
        "generated": sum(tokens.values()),
        "cached": cached,
        "usage": usage,
        "kv_memory": memory / 2**30,
    }


if __name__ == "__main__":
    main()
