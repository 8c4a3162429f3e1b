"""`train`: the loop around the step. It compiles ahead, keeps the device fed, counts the cost,
checkpoints and resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import paths, rundir, trees
from kafjax.core.errors import Preempted, UserError
from kafjax.core.progress import Progress, say, waiting
from kafjax.models import Decoder
from kafjax.ops.quantized import format_of, refuse_quantized
from kafjax.parallel import make_mesh, n_data_shares, shardings
from kafjax.parallel.distributed import is_main
from kafjax.parallel.preemption import Preemption
from kafjax.parallel.watchdog import Watchdog
from kafjax.training.batches import Batches, Example
from kafjax.training.checkpoint import Checkpoints
from kafjax.training.config import TrainConfig
from kafjax.training.feed import Source, feed
from kafjax.training.memory import PeakMemory
from kafjax.training.packed import PackedRows
from kafjax.training.step import TrainState, batch_sharding
from kafjax.training.task import CompiledStep, Task
from kafjax.training.took import Took

Log = Callable[..., None]
Data = Sequence[Sequence[Example]] | PackedRows
_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult(Took):
    """Result and cost of a training.

    Attributes:
      trainable: the trained parameters (without the frozen ones), or adapters for the model that
        was given.
      spec: the adapters' spec: the one asked for, or with PiSSA and OLoRA an ordinary one of twice
        the rank (`lora.plain`); None without adapters.
      curve: a dict a step: step, loss, grad_norm, learning_rate, tokens, targets, loss_places.
    """

    trainable: Any
    spec: lora.Spec | None
    curve: list[dict[str, float]]


def train(
    model: Decoder,
    params: trees.Tree,
    variants: Data,
    config: TrainConfig,
    *,
    spec: lora.Spec | None = None,
    mesh: Mesh | None = None,
    run_dir: Path | None = None,
    log: Log | None = None,
    label: str = "train",
    donate: bool = False,
    start: lora.Adapters | None = None,
) -> TrainResult:
    """Trains all parameters of `model`, or with `spec` a LoRA adapter. `params` stays as it was,
    unless it is donated.

    Args:
      model: its `dtype` is that of the activations; what trains is kept in `config.param_dtype`.
      params: float32; with `spec` its kernels may be quantised (`ops.quantized`).
      variants: lists of examples, of which epoch e reads `variants[e % len(variants)]`; or rows
        packed beforehand.
      mesh: all devices by default.
      run_dir: where checkpoints go and are resumed from; needed if `config.checkpoint_every` is
        set. Many processes share it.
      log: called after each step as `log(label=..., step=..., loss=..., ...)`. After a resume it
        sees the steps since the last checkpoint again, with the same values.
      label: names this training in messages and logs.
      donate: hands the memory of the trainable part of `params` to the training. Its arrays cannot
        be read afterwards.
      start: adapters of `spec` to go on from; by default new ones are drawn.

    Raises:
      UserError: nothing to train on, adapters to go on from that are none of `spec`, tokens beyond the vocabulary, sizes that do not fit the mesh,
        a loss that is no longer finite, a checkpoint of another training in `run_dir`, a disk that
        takes no checkpoint.
      Preempted: SIGTERM came, and the step that it came in is saved, if checkpoints are. In all
        processes at the same step.
    """
    mesh = make_mesh() if mesh is None else mesh
    _check_tokens(model, variants)
    batches = batches_of(variants, config, n_data_shares(mesh))
    n_steps = len(batches) if config.steps is None else config.steps
    if told := batches.cuts.told(config.seq_len):
        say(label, told)
    fingerprint = fingerprint_of(model, params, variants, config, spec)
    with PeakMemory() as peak, open_checkpoints(run_dir, config, fingerprint) as checkpoints:
        if spec is None:
            task = Task.full(model, params, config, mesh, n_steps, donate)
        else:
            task = Task.lora(model, params, config, mesh, n_steps, spec, start)
        restored = None if checkpoints is None else checkpoints.restore(task.abstract)
        begin: tuple[TrainState, dict[str, Any]] = restored or (
            task.new_state(),
            {"seconds": 0.0, "curve": []},
        )
        state, history = begin
        # a state that was restored, cast or moved has not taken their memory
        for x in task.donated:
            x.delete()
        if done := len(history["curve"]):
            say(label, f"resuming after step {done} of {n_steps}")
        with waiting(
            label, f"compiling for {n_steps} steps of {config.batch_rows} x {config.seq_len} tokens"
        ):
            compiled = task.compile(batches[0])
        with (
            Preemption() as preemption,
            contextlib.nullcontext() if run_dir is None else Watchdog(run_dir) as watchdog,
        ):
            run = _Run(
                task,
                compiled,
                batches,
                checkpoints,
                history,
                n_steps,
                log,
                label,
                preemption,
                watchdog,
            )
            state = run.steps(state)
    tokens = sum(row["tokens"] for row in history["curve"])
    trainable, plain_spec = task.finished(state.trainable)
    return TrainResult(
        trainable=trainable,
        spec=plain_spec,
        curve=history["curve"],
        steps=n_steps,
        tokens=tokens,
        targets=batches.n_targets(n_steps),
        seconds=history["seconds"],
        compile_seconds=compiled.seconds,
        tokens_per_second=tokens / history["seconds"],
        trainable_parameters=trees.count(state.trainable)
        if spec is None
        else lora.count(spec, params),
        optimizer_bytes=sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        flops_measured=compiled.flops * n_steps
        + compiled.flops_a_place * sum(map(_loss_places, history["curve"])),
        flops_useful=compiled.flops * n_steps + compiled.flops_a_place * batches.n_targets(n_steps),
        argument_bytes=compiled.argument_bytes,
        temporary_bytes=compiled.temporary_bytes,
        peak_memory_bytes=peak.n_bytes,
        final_loss=history["curve"][-1]["loss"],
    )


def _loss_places(row: dict[str, float]) -> float:
    """Counts the places whose logits a step computed. Steps of lanes and of older releases noted
    their targets alone."""
    return row.get("loss_places", row["targets"])


def check_training(
    model: Decoder,
    params: trees.Tree,
    variants: Data,
    config: TrainConfig,
    *,
    spec: lora.Spec | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Raises what `train` would raise before its first step: nothing to train on, an adapter, sizes
    or tokens that do not fit."""
    mesh = make_mesh() if mesh is None else mesh
    _check_tokens(model, variants)
    batches_of(variants, config, n_data_shares(mesh))
    shardings(model.axes(), params, mesh)
    if spec is None:
        refuse_quantized(params, "full fine-tuning")
    else:
        adapters = lora.abstract(spec, params)
        shardings(lora.axes(adapters, model.axes()), adapters, mesh)


def _check_tokens(model: Decoder, variants: Data) -> None:
    """Raises `UserError` for tokens beyond the embedding, whose lookup would silently read its last
    row."""
    examples = (
        ()
        if isinstance(variants, PackedRows)
        else (example for of_epoch in variants for example in of_epoch)
    )
    highest = max((int(example.tokens.max(initial=0)) for example in examples), default=0)
    if highest >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer is not this model's: token {highest} of a vocabulary of {model.config.vocab_size}"
        )


@dataclasses.dataclass
class _Run:
    """The steps of one training, from where `history` ends. `history` is what a checkpoint keeps
    beside the state."""

    task: Task
    compiled: CompiledStep
    batches: Source
    checkpoints: Checkpoints | None
    history: dict[str, Any]
    n_steps: int
    log: Log | None
    label: str
    preemption: Preemption
    watchdog: Watchdog | None

    def steps(self, state: TrainState) -> TrainState:
        done = len(self.history["curve"])
        where = batch_sharding(self.task.mesh, self.task.config.accumulate)
        self._clock, self._tokens = time.perf_counter(), 0
        self._seconds_before = self.history["seconds"]
        running = None  # the step that the device may still be working on
        with (
            Progress(self.label, self.n_steps, done) as self._progress,
            jax.transfer_guard("disallow"),
        ):
            for step in range(done, self.n_steps):
                if self.watchdog is not None:
                    self.watchdog.reached(step + 1)
                batch = feed(self.batches, step, where)
                state, metrics = self.compiled.step(state, self.task.frozen, batch)
                # Only now read the step before: the device has work meanwhile.
                if running is not None:
                    self._record(*running)
                running = (step, metrics)
                if self.checkpoints is not None:
                    self.checkpoints.check()
                # Asked at every step, as all processes have to: they agree on one.
                leave = self.preemption.reached(step + 1) and step + 1 < self.n_steps
                if leave or self._is_due(step + 1):
                    self._record(*running)
                    running = None
                    self._save(step + 1, state)
                if leave:
                    self._leave(step + 1)
            if running is not None:
                self._record(*running)
        return state

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row = {"step": step + 1, **values, "tokens": self.batches.n_tokens(step)}
        if not math.isfinite(row["loss"]):
            rate = self.task.config.learning_rate
            raise UserError(
                f"{self.label}: the loss is {row['loss']} at step {step + 1}; lower the learning rate ({rate:g})"
            )
        self.history["curve"].append(row)
        seconds = time.perf_counter() - self._clock
        self.history["seconds"] = self._seconds_before + seconds
        self._tokens += row["tokens"]
        self._progress.advance(1, f"loss {row['loss']:.3f}, {self._tokens / seconds:.0f} tokens/s")
        if self.log is not None and is_main():
            self.log(label=self.label, **row)

    def _is_due(self, step: int) -> bool:
        return (
            self.checkpoints is not None
            and step % self.task.config.checkpoint_every == 0
            and step < self.n_steps
        )

    def _save(self, step: int, state: TrainState) -> None:
        if self.checkpoints is None:
            return
        began = time.perf_counter()
        with jax.transfer_guard("allow"):
            self.checkpoints.save(step, state, self.history)
        self._clock += time.perf_counter() - began  # saving is not training

    def _leave(self, step: int) -> None:
        if self.checkpoints is None:
            raise Preempted(
                f"{self.label}: step {step} of {self.n_steps} is lost, as checkpoints are off"
            )
        self.checkpoints.wait()
        raise Preempted(
            f"{self.label}: saved step {step} of {self.n_steps}; run the same command again to go on"
        )


def discard_checkpoints(run_dir: Path) -> None:
    """Deletes the checkpoints of `train` in `run_dir`. They are of no use once the result is saved,
    and several times its size."""
    paths.delete(run_dir / _CHECKPOINTS)


def batches_of(variants: Data, config: TrainConfig, groups: int) -> Source:
    shape = {
        "batch_rows": config.batch_rows,
        "seed": config.seed,
        "accumulate": config.accumulate,
        "groups": groups,
    }

    def build(epochs: int) -> Source:
        if isinstance(variants, PackedRows):
            return variants.batches(epochs=epochs, **shape)
        return Batches(variants, seq_len=config.seq_len, epochs=epochs, **shape)

    if isinstance(variants, PackedRows) and variants.about.seq_len != config.seq_len:
        raise UserError(
            f"{variants.folder} holds rows of {variants.about.seq_len} tokens, not seq_len={config.seq_len}"
        )
    if config.steps is None:
        return build(config.epochs)
    batches = build(1)
    while len(batches) < config.steps:
        batches = build(
            max(batches.epochs + 1, math.ceil(batches.epochs * config.steps / len(batches)))
        )
    return batches


def refuse_checkpoints(run_dir: Path, config: TrainConfig) -> None:
    """Raises `UserError` for checkpoints of many processes in a bucket that orbax does not write to
    (tried: 0.12.8): each has parts of its own."""
    if config.checkpoint_every > 0 and str(run_dir).startswith("s3:") and jax.process_count() > 1:
        raise UserError(
            f"checkpoints of many processes are not written to {run_dir}: orbax knows gs:// and folders; "
            "give --checkpoint_every=0, or mount the bucket and give its path"
        )


def open_checkpoints(
    run_dir: Path | None, config: TrainConfig, fingerprint: str
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    if config.checkpoint_every <= 0:
        return contextlib.nullcontext()
    if run_dir is None:
        raise UserError(
            "checkpoint_every is set, but there is no run directory to put checkpoints in"
        )
    refuse_checkpoints(run_dir, config)
    return Checkpoints(run_dir / _CHECKPOINTS, fingerprint)


def fingerprint_of(
    model: Decoder, params: trees.Tree, variants: Data, config: TrainConfig, spec: lora.Spec | None
) -> str:
    """Hashes everything that determines the loss curve. The base model counts by config, shapes and
    quantised format, not by values."""
    data = variants.about.checksum if isinstance(variants, PackedRows) else 0
    for examples in () if isinstance(variants, PackedRows) else variants:
        for example in examples:
            data = zlib.crc32(np.ascontiguousarray(example.weights).data, data)
            data = zlib.crc32(np.ascontiguousarray(example.tokens).data, data)
    told = dataclasses.asdict(model.config)
    return rundir.config_hash(
        {
            # Without what is at its default, so that a switch for another family leaves the
            # checkpoints of this one readable.
            "model": {
                f.name: told[f.name]
                for f in dataclasses.fields(model.config)
                if getattr(model.config, f.name) != f.default
            },
            "dtype": str(np.dtype(model.dtype)),
            "shapes": {path: list(leaf.shape) for path, leaf in trees.flatten(params).items()},
            "quantised": format_of(params),
            "config": {
                name: value
                for name, value in dataclasses.asdict(config).items()
                if name not in ("checkpoint_every", "remat")
            },
            "spec": None if spec is None else dataclasses.asdict(spec),
            "data": data,
        }
    )
