"""Train the reference checkpoint: a small Qwen3.5-shaped hybrid that solves the evaluation's tasks.

    PYTHONPATH=src python recipes/reference/train.py --seconds 500 --out out/reference

Processes on the CPU write documents, one CUDA graph per shape holds the whole step, lengths grow as time passes. Every two
minutes the checkpoint is saved (bf16, and float32 in two shards to go on from with --init); then it is evaluated.
"""

import argparse
import copy
import json
import multiprocessing as mp
import queue
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import NAMES, Documents, Encoder, evaluation_row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5 import modeling_qwen3_5 as M
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

try:
    import jaxtyping  # noqa: F401
except ImportError:  # annotations only: training machines need not have it
    hints = types.ModuleType("jaxtyping")
    hints.Float = type("Float", (), {"__class_getitem__": classmethod(lambda cls, _: Tensor)})
    sys.modules["jaxtyping"] = hints
from topmass.integrations.transformers.gated_delta import chunk_gated_delta_rule

CONFIG = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "max_position_embeddings": 65536, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}  # fmt: skip
HALF_LIVES = (
    3.0,
    7.0,
    17.0,
    40.0,
)  # tokens, one per gated delta head: what is farther away must come through full attention
STAGES = ((256, 256), (512, 128), (1024, 64), (4096, 16), (8192, 8), (16384, 4), (32768, 2))  # tokens, rows
ENDS = (0.20, 0.36, 0.52, 0.66, 0.76, 0.90, 1.0)  # the share of the time at which each stage is over
EVAL_ROWS = {1024: 48, 4096: 32, 8192: 16, 16384: 8, 32768: 8}
TRAIN_SEED = 10**9  # evaluation seeds are smaller
SAVE_EVERY, LOG_EVERY = 120.0, 50


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=500, help="time to train for; evaluation comes on top")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a directory saved before, to go on from (with another --seed)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--flat", type=float, default=0.4, help="share of the time before the learning rate falls")
    parser.add_argument("--from-length", type=int, default=0, help="leave out the stages of shorter rows")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=Path("src/topmass/assets/reference"))
    parser.add_argument("--eval-only", action="store_true", help="evaluate --init and stop")
    parser.add_argument("--tiny", action="store_true", help="a smoke test for the CPU")
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------------


def worker(seed: int, directory: Path, stages: list, queues: list, stage: Any, made: Any, busy: Any) -> None:
    """Write batches of the current stage until killed."""
    docs = Documents(Encoder(directory), seed)
    while True:
        at = stage.value
        length, rows = stages[at]
        start = time.perf_counter()
        batch = tuple(np.stack(x) for x in zip(*(docs.row(length) for _ in range(rows)), strict=True))
        with made.get_lock():
            made.value += length * rows
            busy.value += time.perf_counter() - start
        while at == stage.value:
            try:
                queues[at].put(batch, timeout=0.5)
                break
            except queue.Full:
                continue


class Feed:
    """Worker processes and their batches."""

    def __init__(self, args: argparse.Namespace, stages: list) -> None:
        ctx = mp.get_context("fork")
        self.queues = [ctx.Queue(32) for _ in stages]
        self.stage, self.made, self.busy = ctx.Value("i", 0), ctx.Value("d", 0.0), ctx.Value("d", 0.0)
        self.waited = 0.0
        for i in range(args.workers):
            seed = TRAIN_SEED + 10_000 * args.seed + i
            rest = (args.tokenizer, stages, self.queues, self.stage, self.made, self.busy)
            ctx.Process(target=worker, args=(seed, *rest), daemon=True).start()

    def get(self) -> tuple[np.ndarray, ...]:
        start = time.perf_counter()
        batch = self.queues[self.stage.value].get()
        self.waited += time.perf_counter() - start
        return batch

    def rate(self) -> float:
        """Tokens per second of one process."""
        return self.made.value / max(self.busy.value, 1e-9)


# --- model ------------------------------------------------------------------------------------------------------------


def make_model(device: str, tokenizer: Any) -> nn.Module:
    """A fresh model whose gated delta layers forget at fixed rates."""
    newline = tokenizer.encode("\n")[0]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    M.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    M.chunk_gated_delta_rule = chunk_gated_delta_rule
    with torch.device(device):
        model = M.Qwen3_5ForCausalLM(Qwen3_5TextConfig(**CONFIG, **ids))
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["eos_token_id"], newline], pad_token_id=ids["pad_token_id"], do_sample=False
    )
    for layer in model.model.layers:
        if (delta := getattr(layer, "linear_attn", None)) is None:
            continue
        if hasattr(delta, "chunk_gated_delta_rule"):
            delta.chunk_gated_delta_rule = chunk_gated_delta_rule
        # g = -exp(A_log) softplus(dt_bias) = -ln 2 / half-life, whatever the token
        with torch.no_grad():
            delta.in_proj_a.weight.zero_()
            delta.dt_bias.zero_()
            delta.A_log.copy_(-torch.tensor(HALF_LIVES, device=device).log().bfloat16())
        for frozen in (delta.in_proj_a.weight, delta.dt_bias, delta.A_log):
            frozen.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    return model


def save(model: nn.Module, tokenizer: Any, out: Path) -> None:
    """The bf16 checkpoint, and float32 weights in two shards."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.named_parameters()}
    names, half, size = sorted(weights), {}, 0
    total = sum(w.numel() for w in weights.values())
    for name in names:
        half[name] = 0 if size < total / 2 else 1
        size += weights[name].numel()
    (out / "restart").mkdir(exist_ok=True)
    for i in (0, 1):
        save_file({n: weights[n] for n in names if half[n] == i}, out / "restart" / f"{i + 1}-of-2.safetensors")


def load(model: nn.Module, init: Path) -> None:
    """Weights saved before: the float32 shards if they are there."""
    shards = sorted((init / "restart").glob("*.safetensors")) or [init / "model.safetensors"]
    weights = {k: v for shard in shards for k, v in load_file(shard).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{init} is not a checkpoint of this model: missing {missing}, unexpected {unexpected}")


# --- training ---------------------------------------------------------------------------------------------------------


class Trainer:
    """The step of one shape, captured, and what it has counted."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device, self.cuda = model, device, device == "cuda"
        self.lr = torch.tensor(0.0, device=device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01, capturable=self.cuda, foreach=self.cuda
        )
        self.hits, self.seen = torch.zeros(2, len(NAMES) + 1, device=device)
        self.graph = None

    def logits(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda):
            return self.model(input_ids=ids, use_cache=False).logits

    def shape(self, length: int, rows: int) -> None:
        """Prepare for batches of this shape."""
        self.graph = self.loss = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.empty_cache()
        self.ids = torch.randint(0, CONFIG["vocab_size"], (rows, length), device=self.device)
        self.weights = torch.ones(rows, length, device=self.device)
        self.tags = torch.zeros(rows, length, dtype=torch.long, device=self.device)
        if not self.cuda:
            return
        self.lr.fill_(0.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._step()
            self.optimizer.zero_grad(set_to_none=False)
        self.hits.zero_()
        self.seen.zero_()

    def _step(self) -> Tensor:
        logits = self.logits(self.ids)[:, :-1].flatten(0, 1).float()
        target, weights, tags = (x[:, 1:].flatten() for x in (self.ids, self.weights, self.tags))
        loss = (F.cross_entropy(logits, target, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()
        self.hits.index_add_(0, tags, (logits.argmax(-1) == target).float())
        self.seen.index_add_(0, tags, torch.ones_like(weights))
        return loss.detach()

    def step(self, batch: tuple[np.ndarray, ...]) -> None:
        for static, new in zip((self.ids, self.weights, self.tags), batch, strict=True):
            static.copy_(torch.from_numpy(new))
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.loss = self._step()

    def accuracies(self) -> dict[str, float]:
        """Share of answer tokens right per task since the last call."""
        right = (self.hits / self.seen.clamp_min(1)).tolist()
        self.hits.zero_()
        self.seen.zero_()
        return {name: round(right[i + 1], 4) for i, name in enumerate(NAMES)}


def train(trainer: Trainer, args: argparse.Namespace, stages: list, ends: list, log: Any, tokenizer: Any) -> None:
    feed = Feed(args, stages)
    begin = saved = time.time()
    step, current = 0, -1
    while (done := (time.time() - begin) / args.seconds) < 1:
        at = next(i for i, end in enumerate(ends) if done < end)
        if at != current:
            feed.stage.value = current = at
            start = time.time()
            trainer.shape(*stages[at])
            log(kind="stage", length=stages[at][0], rows=stages[at][1], capture_s=time.time() - start)
        fall = 1.0 if done < args.flat else max(0.04, (1 - done) / (1 - args.flat))
        trainer.lr.fill_(args.lr * min(1.0, (step + 1) / args.warmup) * fall)
        trainer.step(feed.get())
        step += 1
        if step % LOG_EVERY == 0 or args.tiny:
            rate = step / (time.time() - begin)
            log(
                kind="train", time_s=time.time() - begin, step=step, length=stages[at][0], loss=trainer.loss.item(),
                steps_per_s=rate, waited_s=feed.waited, worker_tokens_per_s=feed.rate(), **trainer.accuracies(),
            )  # fmt: skip
        if time.time() - saved > SAVE_EVERY:
            save(trainer.model, tokenizer, args.out)
            saved = time.time()
    trainer.graph = None


# --- evaluation -------------------------------------------------------------------------------------------------------


def _rows(job: tuple[Path, str, int, int]) -> tuple[list[int], list[int]]:
    directory, name, length, seed = job
    return evaluation_row(Encoder(directory), name, length, seed)


def oracle_attention(budget: float) -> Any:
    """Attention on each query's keys of largest head-averaged mass, `budget` of them as a share of the context."""

    def forward(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        length, chunk = q.shape[2], 256
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, keep = torch.empty_like(q), max(1, int(budget * length))
        for s in range(0, length, chunk):
            e = min(length, s + chunk)
            scores = (q[:, :, s:e] @ k[:, :, :e].mT).float() * scaling
            future = torch.arange(e, device=q.device)[None] > torch.arange(s, e, device=q.device)[:, None]
            p = scores.masked_fill_(future, -torch.inf).softmax(-1)
            if keep < e:
                mass = p.mean(1)
                least = mass.topk(keep, -1).values[..., -1:]
                p = scores.masked_fill_((mass < least)[:, None], -torch.inf).softmax(-1)
            out[:, :, s:e] = p.to(v.dtype) @ v[:, :, :e]
        return out.transpose(1, 2).contiguous(), None

    return forward


def evaluate(trainer: Trainer, args: argparse.Namespace, log: Any) -> None:
    """Teacher-forced answers: share of first answer tokens right (what sparse prefill decides), and of whole answers."""
    model = trainer.model.eval()
    rows = {1024: 2} if args.tiny else EVAL_ROWS
    attentions = {"dense": None, "zero": lambda m, q, k, v, mask, **_: (torch.zeros_like(q).transpose(1, 2), None)}
    attentions |= {f"oracle 1/{n}": oracle_attention(1 / n) for n in (128, 32, 8)}
    plan = [(length, "dense") for length in rows] + [
        (n, a) for n in (4096,) if n in rows for a in ("zero", "oracle 1/128", "oracle 1/8")
    ]
    with mp.get_context("spawn").Pool(args.workers) as pool:
        jobs = {n: [(args.tokenizer, task, n, i) for task in NAMES for i in range(k)] for n, k in rows.items()}
        made = {n: pool.map_async(_rows, js, chunksize=1) for n, js in jobs.items()}
        data = {n: x.get() for n, x in made.items()}
    for length, name in plan:
        batch = max(1, 32768 // length)
        model.set_attn_implementation("sdpa")
        if attentions[name] is not None:
            ALL_ATTENTION_FUNCTIONS.register("reference_eval", attentions[name])
            ALL_MASK_ATTENTION_FUNCTIONS.register("reference_eval", lambda *_, **__: None)
            model.set_attn_implementation("reference_eval")
        first, whole = {}, {}
        for task in NAMES:
            mine = [row for (_, name_, _, _), row in zip(jobs[length], data[length], strict=True) if name_ == task]
            right = torch.cat([_judge(trainer, mine[i : i + batch]) for i in range(0, len(mine), batch)])
            first[task], whole[task] = (round(x, 4) for x in right.float().mean(0).tolist())
        log(kind="eval", attention=name, length=length, rows=rows[length], first=first, whole=whole)


@torch.inference_mode()
def _judge(trainer: Trainer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Per row: the first answer token right, all of them right."""
    ids = torch.tensor([r[0] for r in rows], device=trainer.device)
    part = torch.tensor([r[1] for r in rows], device=trainer.device)[:, 1:]
    right = trainer.logits(ids)[:, :-1].argmax(-1) == ids[:, 1:]
    return torch.stack([(right & (part == 2)).any(1), (right | (part == 0)).all(1)], 1).cpu()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    stages, ends = list(STAGES), list(ENDS)
    if args.tiny:
        stages, ends = [(256, 4), (512, 2)], [0.6, 1.0]
    if args.from_length:
        keep = [i for i, (n, _) in enumerate(stages) if n >= args.from_length]
        base = ends[keep[0] - 1] if keep[0] else 0.0
        stages, ends = [stages[i] for i in keep], [(ends[i] - base) / (1 - base) for i in keep]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    file = (args.out / "train_log.jsonl").open("a")
    begin = time.time()

    def log(**values: Any) -> None:
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"wall_s": round(time.time() - begin, 1), **short})
        print(line, flush=True)
        file.write(line + "\n")
        file.flush()

    model = make_model(device, tokenizer)
    if args.init:
        load(model, args.init)
    log(
        kind="start",
        device=device,
        parameters=sum(p.numel() for p in model.parameters()),
        stages=stages,
        half_lives=HALF_LIVES,
    )
    trainer = Trainer(model, device)
    if not args.eval_only:
        train(trainer, args, stages, ends, log, tokenizer)
        save(model, tokenizer, args.out)
        log(kind="saved", bytes=(args.out / "model.safetensors").stat().st_size)
    evaluate(trainer, args, log)


if __name__ == "__main__":
    main()
