"""Engines of vLLM in processes of their own: one that a worker drives, and the OpenAI-compatible server."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from topmass.errors import ConfigError

__all__ = ["Answers", "Driver", "Engine", "Launch", "OfflineEngine", "Server", "flags", "open_engine"]

Driver = Literal["offline", "server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A model that engines are started with.

    Attributes:
        model: Directory or hub id; its tokenizer is not used.
        vocabulary: Tokens of its vocabulary that prompts are drawn from.
        text: Token ids of a text that prompts are windows of; none draws random ones.
        source: What that text is called.
        indexer: Directory of the indexer, or `reference`.
        stand_in: It is a `stress_indexer`.
        python: Interpreter that has vLLM.
        options: Arguments of every engine, by their name in Python.
        patience: Seconds that a start may take.
    """

    model: str
    vocabulary: int
    text: Sequence[int] = ()
    source: str = ""
    indexer: str = ""
    stand_in: bool = False
    python: str = sys.executable
    options: Mapping[str, Any] = field(default_factory=dict)
    patience: float | int = 900


@dataclass(slots=True, kw_only=True)
class Answers:
    """What one engine did with some requests.

    Attributes:
        requests: By request `ttft`, `tpot` and `latency`, ms.
        seconds: From the first request's moment to the last token.
        generated: Tokens.
        cached: Prompt tokens that were in the prefix cache.
        usage: Largest share of the KV cache in use.
        kv_memory: The same in GiB, where the engine says.
    """

    requests: list[dict[str, float]]
    seconds: float
    generated: int
    cached: int
    usage: float
    kv_memory: float | None = None

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        """Several that came one after the other."""
        memory = [p.kv_memory for p in parts if p.kv_memory is not None]
        return cls(
            requests=[r for p in parts for r in p.requests],
            seconds=sum(p.seconds for p in parts),
            generated=sum(p.generated for p in parts),
            cached=sum(p.cached for p in parts),
            usage=max(p.usage for p in parts),
            kv_memory=max(memory, default=None),
        )

    def totals(self, length: int) -> dict[str, float]:
        """Metrics of all requests together, with prompts of `length` tokens."""
        found = {
            "throughput": self.generated / self.seconds,
            "prompt_throughput": len(self.requests) * length / self.seconds,
            "prefix_hits": self.cached / (len(self.requests) * length),
            "kv_usage": self.usage,
        }
        return found | ({} if self.kv_memory is None else {"kv_memory": self.kv_memory})


def timing(due: float, first: float, last: float, tokens: int) -> dict[str, float]:
    """Metrics of a request, from moments in seconds.

    Example:
        >>> timing(1.0, 1.5, 2.0, 6)
        {'ttft': 500.0, 'latency': 1000.0, 'tpot': 100.0}
    """
    found = {"ttft": 1e3 * (first - due), "latency": 1e3 * (last - due)}
    return found | ({"tpot": 1e3 * (last - first) / (tokens - 1)} if tokens > 1 else {})


class Engine:
    """A process, which ends with the block that it is opened for."""

    def __init__(self, command: Sequence[str], *, patience: float | int, **pipes: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the engine
        quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
        given = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        if command[0] == sys.executable:
            # the same topmass, where it is not installed
            source = str(Path(__file__).parents[2])
            given["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [given.get("PYTHONPATH")])])
        # a group of its own: an engine has children
        self.process = subprocess.Popen(
            command, stderr=self._log, env={**quiet, **given}, start_new_session=True, **pipes
        )
        self._patience = patience

    def ask(self, prompts: Sequence[Sequence[int]], moments: Sequence[float] | None, new_tokens: int) -> Answers:
        """Send requests at these moments (none: one after the other) and wait for all of their tokens."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the process and its children at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def words(self) -> str:
        """What it said last of an error."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        # ours, bare or in what pydantic makes of it
        if own := re.findall(r"^topmass: (?:error: )?(.+)$|Value error, (.+?) \[type=", text, re.MULTILINE):
            return "".join(own[-1])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        named = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line) and "Engine core" not in line]
        return (named or lines or ["nothing"])[-1][:600]

    def failed(self) -> ConfigError:
        """What to raise for an engine that is gone."""
        return ConfigError(f"vLLM did not start, or ended (exit code {self.process.poll()}); it said: {self.words()}")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_vllm() -> None:
    """Refuse an environment without vLLM.

    Raises:
        ConfigError: There is none.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("There is no vLLM here to be timed; in a clone of topmass: pip install '.[vllm]'.")


def open_engine(driver: str, launch: Launch, options: Mapping[str, Any]) -> Engine:
    """Start an engine and wait until it is ready.

    Args:
        options: Arguments of the engine, beside those of `launch`.

    Raises:
        ConfigError: There is no vLLM, or the engine did not start.
    """
    if launch.python == sys.executable:
        check_vllm()
    given = {**launch.options, **options}
    return (OfflineEngine if driver == "offline" else Server)(launch, given)


class OfflineEngine(Engine):
    """`topmass.bench.serve_worker` in a process."""

    def __init__(self, launch: Launch, options: Mapping[str, Any]) -> None:
        command = [launch.python, "-m", "topmass.bench.serve_worker"]
        super().__init__(command, patience=launch.patience, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._talk({"model": launch.model, **options})

    def ask(self, prompts: Sequence[Sequence[int]], moments: Sequence[float] | None, new_tokens: int) -> Answers:
        return Answers(**self._talk({"prompts": prompts, "moments": moments, "new_tokens": new_tokens}))

    def _talk(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        # what vLLM prints is not an answer
        for line in self.process.stdout:
            if line.startswith("topmass "):
                return json.loads(line.removeprefix("topmass "))
        self.process.wait()
        error = self.failed()
        self.close()
        raise error


class Server(Engine):
    """vLLM's OpenAI-compatible server on a port of this machine."""

    def __init__(self, launch: Launch, options: Mapping[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [launch.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), *flags({"model": launch.model, "served_model_name": "model", **options})]
        super().__init__(command, patience=launch.patience, stdout=subprocess.DEVNULL)
        end = time.monotonic() + launch.patience
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                error = self.failed()
                self.close()
                raise error
            time.sleep(0.2)

    def healthy(self) -> bool:
        """True if it answers."""
        try:
            return self._get("/health")[0] == 200
        except OSError:
            return False

    def metrics(self) -> dict[str, float]:
        """Values at `/metrics` by name, summed over labels."""
        found: dict[str, float] = {}
        for line in self._get("/metrics")[1].splitlines():
            if match := re.match(r"([\w:]+)(?:\{.*\})? (\S+)$", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def ask(self, prompts: Sequence[Sequence[int]], moments: Sequence[float] | None, new_tokens: int) -> Answers:
        before, peak, end = self.metrics(), [0.0], threading.Event()
        watch = threading.Thread(target=self._watch, args=(peak, end))
        watch.start()
        start = time.perf_counter()
        try:
            with ThreadPoolExecutor(1 if moments is None else len(prompts)) as pool:
                due = [None] * len(prompts) if moments is None else [start + moment for moment in moments]
                answers = list(pool.map(lambda p, t: self._request(p, t, new_tokens), prompts, due))
        finally:
            end.set()
            watch.join()
        after = self.metrics()
        return Answers(
            requests=[timing(*a) for a in answers],
            seconds=max(a[2] for a in answers) - start,
            generated=sum(a[3] for a in answers),
            cached=round(after.get(_HITS, 0.0) - before.get(_HITS, 0.0)),
            usage=peak[0],
        )

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation of one prompt."""
        with self._post(prompt, new_tokens, stream=False) as answer:
            return json.loads(answer.read())["choices"][0]["token_ids"]

    def _request(self, prompt: Sequence[int], due: float | None, new_tokens: int) -> tuple[float, float, float, int]:
        if due is None:
            due = time.perf_counter()
        time.sleep(max(0.0, due - time.perf_counter()))
        first = last = 0.0
        tokens = 0
        with self._post(prompt, new_tokens, stream=True) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                last = time.perf_counter()
                first = first or last
                for choice in json.loads(line[6:])["choices"]:
                    tokens += len(choice.get("token_ids") or ())
        return due, first, last, tokens

    @contextlib.contextmanager
    def _post(self, prompt: Sequence[int], new_tokens: int, *, stream: bool) -> Iterator[http.client.HTTPResponse]:
        body = {
            "model": "model",
            "prompt": list(prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self._patience)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ConfigError(f"The server answered {answer.status}: {answer.read(400).decode(errors='replace')}")
            yield answer
        finally:
            connection.close()

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def _watch(self, peak: list[float], end: threading.Event) -> None:
        while not end.wait(0.1):
            with contextlib.suppress(OSError):
                peak[0] = max(peak[0], self.metrics().get("vllm:kv_cache_usage_perc", 0.0))


_HITS = "vllm:prefix_cache_hits_total"


def flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of an engine as `vllm serve` takes them.

    Example:
        >>> flags(
        ...     {"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False, "hf_overrides": {"a": 1}}
        ... )
        ['--max-model-len', '64', '--enforce-eager', '--no-enable-prefix-caching', '--hf-overrides', '{"a": 1}']
    """
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping | list) else str(value)]
    return found
