"""`distill`: train an indexer against the attention mass of a frozen model."""

import importlib.util
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from topmass.distill.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from topmass.distill.config import DistillConfig
from topmass.distill.data import Sequences, open_data
from topmass.distill.loss import indexer_kl
from topmass.distill.parallel import World, join_world
from topmass.distill.teacher import Lesson, Teacher, check_ready, checksum
from topmass.errors import ConfigError, DataError
from topmass.eval.recall import support_quality
from topmass.integrations.transformers.families import find_layers
from topmass.integrations.transformers.index_features import describe_model
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.ops import attention_mass
from topmass.ops.index_topk import index_topk
from topmass.results import Run, make_manifest
from topmass.selection.artifact import IndexerConfig
from topmass.selection.indexer import Indexer

__all__ = ["distill", "untrained"]

# called with (done, total, what is being worked on)
Progress = Callable[[int, int, str], None]

TILES, TILE = 16, 64  # stretches of a held-out sequence that are measured, and their queries
MIN_GAIN = 1e-3  # of held-out recall, below which a measurement is no better
# how a run is organised; may differ when it resumes
_FREE = ("workers", "checkpoint_minutes")


def distill(
    model: Any,
    tokenizer: Any,
    data: Any = "tasks",
    config: DistillConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    text_field: str = "text",
    start: Indexer | None = None,
    facts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], object] | None = None,
) -> Indexer:
    """Train an indexer for every full-attention layer of a frozen model.

    The model attends densely; every layer's indexer learns to predict, by KL, the attention mass of that layer, head-averaged and
    pooled as the served selection ranks it. All layers learn in one forward and apart from each other.

    Under `torchrun` or `accelerate launch` every process takes its share of each step's sequences; gradients are summed, and
    only the first process writes. A model that `device_map` spread over several devices works as it is.

    Args:
        model: A supported transformers causal language model, in eval mode. Its weights do not change, which is checked.
        tokenizer: Its tokenizer.
        data: `"tasks"` (the evaluation's generators at other seeds); text, JSONL or Parquet files; the name of a data set;
            or `Sequences` of your own.
        config: What to do; everything has a default.
        out: Directory for the indexer, the log and, until it is complete, checkpoints (in `out` with `.partial` appended).
            `None` writes nothing.
        resume: Go on from the unfinished run in `out` if there is one; `False` refuses where there is one.
        overwrite: Replace a complete run; the old one stays until the new one is complete.
        text_field: Key or column of the text in JSONL, Parquet and data sets.
        start: Indexer whose weights to begin with, for example from shorter sequences; `None` begins at random.
        facts: `model` and `weights_hash` for the manifest; `None` works them out.
        progress: Called after every step.
        say: Called with one line if an unfinished run goes on; the manifest's last attempt holds its step, too.

    Returns:
        The indexer with the best held-out recall, on the CPU.

    Raises:
        ConfigError: A setting is wrong, or the model is not in eval mode.
        DataError: The data cannot be used, or data, activations or loss hold NaN.
        UnsupportedModelError: The model is one that topmass cannot run.
        RunError: `out` is taken, cannot be written, or cannot be resumed.
        KeyboardInterrupt: Ctrl-C or a termination signal; the last step is saved, and the same call goes on from there.

    Example:
        >>> indexer = topmass.distill(model, tokenizer, "corpus.jsonl", out="indexer")  # doctest: +SKIP
    """
    check_ready(model)
    decoder, _ = find_layers(model)
    first = next(model.parameters()).device
    positions = getattr(decoder.config, "max_position_embeddings", None)
    config = (config or DistillConfig()).resolve(positions=positions, gpu=first.type == "cuda")
    assert config.length is not None
    assert config.batch is not None
    with ExitStack() as stack:
        world = stack.enter_context(join_world())
        sequences = open_data(
            data,
            tokenizer,
            length=config.length,
            wanted=(config.steps * config.batch + config.held_out) * config.length,
            held_out=config.held_out,
            seed=config.seed,
            text_field=text_field,
            told=partial(_reading, progress) if progress and world.rank == 0 else None,
        )
        run = None
        if out is not None and world.rank == 0:
            run = stack.enter_context(_open_run(model, config, sequences, out, resume, overwrite, start, facts))
        before = checksum(model)
        trainer = _Trainer(model, config, sequences, start=start, world=world, run=run, progress=progress, say=say)
        indexer = trainer.train()
        if checksum(model) != before or any(p.grad is not None for p in model.parameters()):
            raise AssertionError("The backbone changed during distillation; please report this.")
        indexer.info = indexer.info.replace(model=facts["model"] if facts else _name(model))
        if run is not None:
            indexer.save(run.directory)
            remove_checkpoint(run.directory)
            run.finish()
        return indexer


def untrained(model: nn.Module, config: DistillConfig) -> Indexer:
    """The indexer from which `distill` starts: the baseline that a trained one has to beat.

    Args:
        config: Only what shapes an indexer matters.
    """
    fingerprint, ropes = describe_model(model)
    _, layers = find_layers(model)
    shapes = {}
    for layer in layers:
        width, key_size = fingerprint.hidden_size, None
        if config.features == "qk":
            width, key_size = fingerprint.q_heads * fingerprint.head_dim, fingerprint.kv_heads * fingerprint.head_dim
        shapes[layer] = IndexerConfig(
            hidden_size=width,
            key_size=key_size,
            dim=config.dim,
            heads=config.heads,
            kv_block=config.kv_block,
            rotary_dim=ropes[layer].index_dim(config.dim),
            features=config.features,
            reduce=config.reducing,
            score_dtype=config.score_dtype,
        )
    indexer = Indexer.create(shapes, fingerprint, seed=config.seed, granularity=config.granularity)
    for layer, module in layers.items():
        # where the layer is, if the model is spread over devices
        indexer.layers[str(layer)].to(next(module.parameters()).device)
    return indexer


@dataclass(slots=True, kw_only=True)
class _Best:
    """The weights with the best held-out recall so far."""

    recall: float = float("-inf")
    step: int = 0
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    by_layer: dict[str, dict[str, float]] = field(default_factory=dict)


class _Trainer:
    """State of one training, in this process."""

    def __init__(
        self,
        model: nn.Module,
        config: DistillConfig,
        sequences: Sequences,
        *,
        start: Indexer | None,
        world: World,
        run: Run | None,
        progress: Progress | None,
        say: Callable[[str], object] | None = None,
    ) -> None:
        assert config.length
        assert config.batch
        assert config.micro_batch
        assert config.budget
        assert config.rows_fraction
        assert config.evaluate_every
        self.length, self.batch, self.micro_batch = config.length, config.batch, config.micro_batch
        self.budget, self.rows_fraction, self.every = config.budget, config.rows_fraction, config.evaluate_every
        self.config, self.sequences, self.world, self.run = config, sequences, world, run
        self.progress = progress if world.rank == 0 else None
        self.say = say if world.rank == 0 else None
        self.indexer = untrained(model, config)
        self.tokens_before = 0
        if start is not None:
            _begin_with(self.indexer, start)
            self.tokens_before = start.info.training_tokens
        self.teacher = Teacher(model, self.indexer)
        self.layers = sorted(self.indexer.info.layers)
        decay = [p for p in self.indexer.parameters() if p.ndim > 1]
        plain = [p for p in self.indexer.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.98),
        )
        self.step = 0
        self.best = _Best()
        self.saved_at = time.monotonic()
        self.board: Any = None

    def train(self) -> Indexer:
        """Take steps until the end, or until held-out recall stops rising."""
        config = self.config
        self._resume()
        with _Stop() as stop, self.teacher.open(), self._board():
            batches = self._batches()
            while self.step < config.steps and not self._stale():
                start = time.perf_counter()
                rows = self._train_step(next(batches), start)
                self.step += 1
                if self.step % self.every == 0 or self.step == config.steps:
                    rows += self._measure()
                self._log(rows)
                interrupted = self._agree(stop.asked)
                if interrupted or self._due():
                    self._save()
                if self.progress is not None:
                    recall = f", recall {self.best.recall:.3f}" if self.best.weights else ""
                    self.progress(self.step, config.steps, f"KL {rows[0]['value']:.4f}{recall}")
                if interrupted and self.step < config.steps:
                    raise KeyboardInterrupt
        return self._finished()

    def _stale(self) -> bool:
        return bool(self.config.patience) and self.best.stale >= self.config.patience

    # --- one step -----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Tensor]]:
        """Micro-batches of this process, step by step from the current one on."""
        config = self.config
        mine = range(self.world.rank, self.batch, self.world.size)
        wanted = [step * self.batch + i for step in range(self.step, config.steps) for i in mine]
        loader = DataLoader(
            _Indexed(self.sequences),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=wanted,
            num_workers=config.workers or 0,
            # two steps ahead
            prefetch_factor=-(-2 * len(mine) // config.workers) if config.workers and mine else None,
            generator=torch.Generator().manual_seed(config.seed),  # else it would draw from the global one
        )
        rows = iter(loader)
        for _ in range(self.step, config.steps):
            own = [next(rows) for _ in mine]
            yield [torch.stack(own[i : i + self.micro_batch]) for i in range(0, len(own), self.micro_batch)]

    def _train_step(self, batches: Sequence[Int[Tensor, "batch len"]], start: float) -> list[dict[str, Any]]:
        config = self.config
        lr = config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for parameter in self.indexer.parameters():
            # zeros, not None: a process without sequences takes part in the sum too
            parameter.grad = torch.zeros_like(parameter)
        rows = self._drawn_rows()
        losses = {layer: torch.zeros(()) for layer in self.layers}
        for ids in batches:
            share = len(ids) / self.batch

            def learn(lesson: Lesson, share: float = share) -> None:
                loss = self._loss(lesson, rows[lesson.layer]) * share
                loss.backward()
                losses[lesson.layer] += loss.detach().float().cpu()

            self.teacher.teach(ids, learn, grad=True)
        gradients = [p.grad for p in self.indexer.parameters() if p.grad is not None]
        self.world.sum([*gradients, *losses.values()])
        norms = {i: self._clipped(i) for i in self.layers}
        self._check(losses, norms)
        self.optimizer.step()
        rate = self.batch * self.length / (time.perf_counter() - start)
        kl = {i: float(x) for i, x in losses.items()}
        return [
            _row(-1, "kl", sum(kl.values()) / len(kl), "nats"),
            _row(-1, "lr", lr, ""),
            _row(-1, "tokens_per_s", rate, "tokens/s"),
            *(_row(i, "kl", x, "nats") for i, x in kl.items()),
            *(_row(i, "grad_norm", x, "") for i, x in norms.items()),
        ]

    def _loss(self, lesson: Lesson, rows: Tensor | None) -> Tensor:
        c = self.config
        return indexer_kl(
            lesson.q,
            lesson.k,
            lesson.lse,
            lesson.iq,
            lesson.ik,
            scale=lesson.scale,
            softcap=lesson.softcap,
            sinks=lesson.sinks,
            granularity=c.granularity,
            pool=c.pool,
            reduce=c.reducing,
            sink=c.sink,
            window=c.window,
            mask_forced=c.mask_forced,
            rows=rows,
        )

    def _drawn_rows(self) -> dict[int, Tensor | None]:
        """Rows of this step's loss by layer: a function of seed, step and layer, so that nothing has to be saved."""
        config = self.config
        blocks = -(-self.length // config.q_block)
        many = max(1, round(self.rows_fraction * blocks))
        if many >= blocks:
            return dict.fromkeys(self.layers)
        drawn: dict[int, Tensor | None] = {}
        for layer in self.layers:
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + self.step) * 1_009 + layer)
            drawn[layer] = torch.randperm(blocks, generator=generator)[:many]
        return drawn

    def _clipped(self, layer: int) -> float:
        parameters = self.indexer.layers[str(layer)].parameters()
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.clip))

    def _check(self, losses: Mapping[int, Tensor], norms: Mapping[int, float]) -> None:
        """Refuse to step on what is not finite."""
        for layer in self.layers:
            if not (bool(losses[layer].isfinite()) and torch.tensor(norms[layer]).isfinite()):
                raise DataError(
                    f"The loss of layer {layer} is not finite at step {self.step + 1}: check the model's weights and the data, "
                    f"or lower the learning rate ({self.config.lr:g})."
                )

    # --- held out -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> list[dict[str, Any]]:
        """Held-out recall and retained mass through the served selection."""
        sums: dict[int, Tensor] = {i: torch.zeros(4, dtype=torch.float64) for i in self.layers}

        def learn(lesson: Lesson) -> None:
            sums[lesson.layer] += self._quality(lesson)

        for i in range(self.world.rank, self.config.held_out, self.world.size):
            ids = torch.tensor(self.sequences.sequence(i, held_out=True))[None]
            self.teacher.teach(ids, learn, grad=False)
        self.world.sum(list(sums.values()))
        names = ("recall", "retained_mass", "oracle_mass")
        table = {i: {name: float(x / s[3]) for name, x in zip(names, s[:3], strict=True)} for i, s in sums.items()}
        means = {name: sum(row[name] for row in table.values()) / len(table) for name in names}
        self._keep_best(means["recall"], table)
        rows = [_row(-1, name, value, "fraction") for name, value in means.items()]
        return rows + [_row(i, name, v, "fraction") for i, row in table.items() for name, v in row.items()]

    def _quality(self, lesson: Lesson) -> Tensor:
        """Sums of recall, retained and attainable mass, and the number of queries measured."""
        config, rule = self.config, self.config.rule
        tile = max(TILE, config.q_block)
        last = self.length // tile
        # tiles in which some query sees more than the budget, spread evenly
        first = min(self.budget // tile, last - 1) if last else 0
        places = torch.linspace(first, max(last - 1, first), TILES).round().long().unique().tolist()
        total = torch.zeros(4, dtype=torch.float64)
        for place in places:
            lo, hi = place * tile, min((place + 1) * tile, self.length)
            score_dtype = None if lesson.iq.dtype == torch.float64 else getattr(torch, config.score_dtype)
            support = index_topk(
                lesson.iq[:, lo:hi],
                lesson.ik[:, : hi // config.kv_block],
                budget=self.budget,
                granularity=config.granularity,
                sink=config.sink,
                window=config.window,
                q_start=lo,
                reduce=config.reducing,
                score_dtype=score_dtype,
            )
            mass = attention_mass(
                lesson.q[:, lo:hi],
                lesson.k[:, :hi],
                lesson.lse[:, lo:hi],
                scale=lesson.scale,
                q_start=lo,
                softcap=lesson.softcap,
                sinks=lesson.sinks,
            )
            found = support_quality(support, mass, rule=rule, pool=config.pool)
            parts = [x.double().sum().cpu() for x in (found.recall, found.retained, found.attainable)]
            total += torch.stack([*parts, torch.tensor(float(found.recall.numel()), dtype=torch.float64)])
        return total

    def _keep_best(self, recall: float, table: dict[int, dict[str, float]]) -> None:
        better = recall > self.best.recall
        stale = 0 if recall > self.best.recall + MIN_GAIN else self.best.stale + 1
        if better or not self.best.weights:
            weights = {n: w.detach().cpu().clone() for n, w in self.indexer.state_dict().items()}
            by_layer = {str(i): row for i, row in table.items()}
            self.best = _Best(recall=recall, step=self.step, weights=weights, by_layer=by_layer)
        self.best.stale = stale

    # --- state --------------------------------------------------------------------------------------------------------

    def _log(self, rows: list[dict[str, Any]]) -> None:
        rows = [{"step": self.step, **row} for row in rows]
        # steps that ran again after the last checkpoint are there already
        if self.run is not None and not self.run.done((self.step,)):
            self.run.append(rows)
        if self.board is not None:
            for row in rows:
                layer = "all" if row["layer"] < 0 else f"layer {row['layer']}"
                self.board.add_scalar(f"{row['metric']}/{layer}", row["value"], self.step)

    @contextmanager
    def _board(self) -> Iterator[None]:
        """Scalars for TensorBoard if that is installed."""
        if self.run is None or importlib.util.find_spec("tensorboard") is None:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]

        self.board = SummaryWriter(str(self.run.directory / "tensorboard"), purge_step=self.step)
        try:
            yield
        finally:
            self.board.close()
            self.board = None

    def _agree(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all have to leave at the same step."""
        flag = torch.tensor(float(asked))
        self.world.sum([flag])
        return bool(flag)

    def _due(self) -> bool:
        return self.step == self.best.step or time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes

    def _save(self) -> None:
        if self.run is None:
            return
        state = {
            "step": self.step,
            "weights": self.indexer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": asdict(self.best),
        }
        save_checkpoint(self.run.directory, state)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        # a checkpoint without rows is of a run that was discarded
        own = load_checkpoint(self.run.directory) if self.run is not None and self.run.resumed else None
        state = self.world.share(own)
        if state is None:
            return
        self.indexer.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], _Best(**state["best"])
        if self.run is not None:
            self.run.manifest["attempts"][-1]["resumed_at_step"] = self.step
            if self.say is not None:
                self.say(f"resuming {self.run.directory}: {self.step} of {self.config.steps} steps are done")

    def _finished(self) -> Indexer:
        """The indexer with its best weights and what is known of it."""
        config, best = self.config, self.best
        indexer = self.indexer.cpu().requires_grad_(False).eval()
        indexer.zero_grad(set_to_none=True)
        indexer.load_state_dict(best.weights)
        recipe = {k: v for k, v in asdict(config).items() if k not in _FREE}
        by_layer = {int(i): row for i, row in best.by_layer.items()}
        indexer.info = indexer.info.replace(
            training_tokens=self.tokens_before + best.step * self.batch * self.length,
            loss={
                "name": "KL(attention mass || indexer softmax)",
                "mask_forced": config.mask_forced,
                "pool": config.pool,
            },
            recipe=recipe | {"data": self.sequences.about, "steps_taken": self.step, "best_step": best.step},
            held_out={"length": self.length, "budget": self.budget, "sequences": config.held_out},
            recall={i: row["recall"] for i, row in by_layer.items()},
            retained_mass={i: row["retained_mass"] for i, row in by_layer.items()},
            recommended_budget=str(self.budget),
        )
        return indexer


def _row(layer: int, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"layer": layer, "metric": metric, "value": value, "unit": unit}


class _Indexed:
    """Training sequences as a data loader reads them."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self._sequences.sequence(index))


class _Stop:
    """The first Ctrl-C or termination signal asks to stop after the step; another one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _name(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _begin_with(indexer: Indexer, start: Indexer) -> None:
    if start.info.layers != indexer.info.layers:
        raise ConfigError(
            "The indexer to start with has other layers or shapes than the configuration asks for; use its own settings "
            "(indexer.info.recipe)."
        )
    indexer.load_state_dict(start.state_dict())


def _open_run(
    model: nn.Module,
    config: DistillConfig,
    sequences: Sequences,
    out: str | Path,
    resume: bool,
    overwrite: bool,
    start: Indexer | None,
    facts: Mapping[str, str] | None,
) -> Run:
    if facts is None:
        facts = {
            "model": getattr(model, "name_or_path", "") or type(model).__name__,
            "weights_hash": weights_hash(model),
        }
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE}
    manifest = make_manifest(
        "distill",
        settings
        | {
            "data": sequences.about,
            "data_fingerprint": sequences.fingerprint,
            "start": start.digest if start else None,
        },
        model=facts["model"],
        weights_hash=facts["weights_hash"],
        seeds={"all": config.seed},
        device=describe_device(model),
    )
    run = Run.open(out, manifest, overwrite=overwrite)
    if run.resumed and not resume:
        with run:
            raise ConfigError(f"{run.directory} holds an unfinished run; delete it, or let it resume.")
    return run


def _reading(progress: Progress, done: int, total: int) -> None:
    progress(done, total, "tokens read")
