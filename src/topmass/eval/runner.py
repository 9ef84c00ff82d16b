"""`evaluate`: greedy answers of one model under many selectors, on the same samples."""

import copy
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from topmass.errors import ConfigError
from topmass.eval.recall import RecallMeter
from topmass.eval.settings import Infeasible, columns
from topmass.eval.tasks import Sample, list_tasks, make_samples, score
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.sparsify import Decode, sparsify
from topmass.selection import DenseSelector, Selector

if TYPE_CHECKING:
    from topmass.results.store import Run

__all__ = ["EvalResult", "Progress", "evaluate", "evaluate_samples"]

# called with (done, total, what is being worked on)
Progress = Callable[[int, int, str], None]

# the end of a context is run with each question, so that no query block is split between two forwards
ALIGN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Answers and scores, one record per sample and configuration.

    Attributes:
        records: Rows with the columns of the `eval` schema (docs/schemas.md).
    """

    records: Sequence[Mapping[str, Any]]

    def to_records(self) -> list[dict[str, Any]]:
        """Rows with the columns of the `eval` schema."""
        return [dict(r) for r in self.records]

    def accuracy(self) -> dict[tuple[str, int, str], float]:
        """Mean score by (task, length, configuration)."""
        scores = defaultdict(list)
        for r in self.records:
            if r["status"] == "ok":
                scores[r["task"], r["length"], r["config"]].append(r["score"])
        return {cell: sum(s) / len(s) for cell, s in scores.items()}


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (4096,),
    n: int = 20,
    seed: int = 0,
    questions: int = 1,
    selectors: Mapping[str, Selector | Infeasible] | None = None,
    decode: Decode = "dense",
    backend: str = "auto",
    haystack: str | Path | None = None,
    batch_tokens: int = 4096,
    run: "Run | None" = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Answer task questions greedily under every selector, dense and sparse on the same samples.

    A haystack is prefilled once per selector and branched per question; its questions are one cluster in every interval.

    Args:
        tasks: Task names; `None` means all.
        lengths: Prompt and answer together, in the model's tokens.
        n: Haystacks per task and length.
        seed: Seed of the haystacks.
        questions: Questions per haystack, fewer where a task supports fewer.
        selectors: Configurations by label; `None` means dense only.
        decode: How generated positions attend.
        backend: Kernel backend of the sparse attention.
        haystack: Text file that replaces the bundled filler.
        batch_tokens: Prompt tokens computed together; at least one haystack.
        run: An open run directory: finished cells are skipped, new rows stored as they come.
        progress: Called after every batch.

    Raises:
        ConfigError: A task is unknown, a length is beyond the model's positions, or one is given in the place of a list.
        DataError: A task does not fit a length.
        UnsupportedModelError: The model is one that topmass cannot run.
    """
    check_lengths(model, lengths)
    if isinstance(tasks, str):
        raise ConfigError(f"tasks must be a list, such as [{tasks!r}], got {tasks!r}.")
    samples = [
        sample
        for length in lengths
        for task in tasks or list_tasks()
        for sample in _samples(task, tokenizer, length, n, seed, questions, haystack)
    ]
    return evaluate_samples(
        model,
        tokenizer,
        samples,
        selectors=selectors,
        decode=decode,
        backend=backend,
        batch_tokens=batch_tokens,
        run=run,
        progress=progress,
    )


def evaluate_samples(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    selectors: Mapping[str, Selector | Infeasible] | None = None,
    decode: Decode = "dense",
    backend: str = "auto",
    batch_tokens: int = 4096,
    run: "Run | None" = None,
    progress: Progress | None = None,
) -> EvalResult:
    """The same as `evaluate`, on samples that are at hand."""
    selectors = selectors or {"dense": DenseSelector()}
    batches = list(_batches(samples, batch_tokens))
    total, done = len(selectors) * len(samples), 0
    rows: list[dict[str, Any]] = [] if run is None else run.rows
    with fast_linear_attention(model):
        for batch in batches:
            for name, selector in selectors.items():
                if run is None:
                    rows += _rows(model, tokenizer, batch, name, selector, decode, backend)
                elif not all(run.done(_key(s, name)) for s in batch):
                    new = _rows(model, tokenizer, batch, name, selector, decode, backend)
                    run.append(row for row in new if not run.done(row))
                done += len(batch)
                if progress is not None:
                    progress(done, total, f"{batch[0].length} tokens, {name}")
    return EvalResult(records=rows)


def _samples(
    task: str, tokenizer: Any, length: int, n: int, seed: int, questions: int, haystack: str | Path | None
) -> list[Sample]:
    from topmass.eval.tasks import get_task

    chosen = get_task(task)
    if chosen.filler is None and haystack is not None:
        warnings.warn(f"{task} has no filler, so haystack={haystack} has no effect on it", stacklevel=3)
        haystack = None
    questions = min(questions, chosen.max_questions)
    return make_samples(task, tokenizer, length=length, n=n, seed=seed, questions=questions, haystack=haystack)


def _batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Samples of whole haystacks of one length, up to `batch_tokens` of context."""
    haystacks: dict[tuple[int, str, int], list[Sample]] = defaultdict(list)
    for s in samples:
        haystacks[s.length, s.task, s.haystack].append(s)
    batch: list[Sample] = []
    held = 0
    for (length, _, _), group in haystacks.items():
        if batch and (batch[0].length != length or held + length > batch_tokens):
            yield batch
            batch, held = [], 0
        batch = batch + group
        held += length
    if batch:
        yield batch


def _key(sample: Sample, config: str) -> tuple[Any, ...]:
    return (sample.task, sample.length, sample.seed, sample.haystack, sample.question_id, config)


def _rows(
    model: Any,
    tokenizer: Any,
    batch: Sequence[Sample],
    name: str,
    selector: Selector | Infeasible,
    decode: Decode,
    backend: str,
) -> list[dict[str, Any]]:
    infeasible = isinstance(selector, Infeasible)
    start = time.perf_counter()
    answers = [("", 0)] * len(batch)
    keys: float | None = None
    kernels: str | None = None
    meter = RecallMeter()
    if not infeasible:
        with sparsify(model, selector, decode=decode, backend=backend) as run:
            run.observe = meter
            answers = greedy_answers(model, tokenizer, batch)
        keys, kernels = run.receipt.keys_read_mean, run.receipt.kernels
    seconds = (time.perf_counter() - start) / len(batch)
    setting = columns(selector)
    config, fingerprint = (selector.settings, "") if infeasible else (selector.config(), selector.fingerprint)
    return [
        {
            **setting,
            "task": s.task,
            "length": s.length,
            "haystack": s.haystack,
            "question_id": s.question_id,
            "seed": s.seed,
            "config": name,
            "dense_below": config.get("dense_below", 0),
            "decode": decode,
            "fingerprint": fingerprint,
            "status": "infeasible" if infeasible else "ok",
            "score": None if infeasible else score(s, text),
            "prediction": None if infeasible else text,
            "references": json.dumps(s.references),
            "prompt_tokens": tokens,
            "keys_read_mean": keys,
            "seconds": None if infeasible else seconds,
            "backend": kernels,
            "support_recall": meter.recall,
        }
        for s, (text, tokens) in zip(batch, answers, strict=True)
    ]


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, batch: Sequence[Sample]) -> list[tuple[str, int]]:
    """Greedy answer and prompt length of every sample; each haystack is prefilled once.

    Haystacks may have different token counts: they share a prefill up to the shortest one's last multiple of 64
    tokens, and what remains is run with each question.
    """
    keys = [(s.task, s.haystack) for s in batch]
    context = {key: _encode(tokenizer, s.context) for key, s in zip(keys, batch, strict=True)}
    haystacks = list(context)
    shared = min(len(ids) for ids in context.values()) // ALIGN * ALIGN
    device = next(model.parameters()).device
    prefix = torch.tensor([context[key][:shared] for key in haystacks], device=device)
    cache = _prefill(model, prefix) if shared else None
    prompts = [context[key] + _encode(tokenizer, s.question, special=False) for key, s in zip(keys, batch, strict=True)]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, s in enumerate(batch):
        groups[len(prompts[i]), s.max_new_tokens].append(i)
    answers: list[tuple[str, int]] = [("", 0)] * len(batch)
    for (length, new_tokens), members in groups.items():
        ids = torch.tensor([prompts[i] for i in members], device=device)
        branch = cache
        if cache is not None:
            branch = copy.deepcopy(cache) if len(groups) > 1 else cache
            branch.reorder_cache(torch.tensor([haystacks.index(keys[i]) for i in members], device=device))
        texts = _generate(model, tokenizer, ids, branch, new_tokens)
        for i, text in zip(members, texts, strict=True):
            answers[i] = (text, length)
    return answers


def _encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _prefill(model: Any, ids: Int[Tensor, "batch len"]) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _generate(model: Any, tokenizer: Any, ids: Int[Tensor, "batch len"], cache: Any, new_tokens: int) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.generation_config.eos_token_id
    pad = pad[0] if isinstance(pad, list) else pad
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    if isinstance(lengths, int):
        raise ConfigError(f"lengths must be a list, such as [{lengths}], got {lengths}.")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for length in lengths:
        if length < 1:
            raise ConfigError(f"A length must be positive, got {length}.")
        if limit is not None and length > limit:
            raise ConfigError(
                f"A length of {length} tokens is beyond the model's {limit} positions; choose a shorter one."
            )
