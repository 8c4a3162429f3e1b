"""Training steps of Gemma 3 270M beside PyTorch: tokens a second of LoRA and of full fine-tuning, as ratios within one run.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --cases=lora_all --steps=10 --rows=8

Both sides have the same weights, batches, loss places, optimizer (AdamW) and number of threads; the embedding is frozen in
both, and in both the vocabulary is only multiplied where the loss looks. Steps alternate (ours, theirs, ours ...), so that a
machine that changes its pace changes it for both. Before anything is timed, both must give the same loss on the same batch.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
from absl import flags

from experiments.common import DTYPES, use_compilation_cache
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.hub.names import GEMMA3
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Decoder
from kafjax.parallel import make_mesh
from kafjax.training import Batch, Example, TrainConfig, make_batch
from kafjax.training.batches import pack
from kafjax.training.task import Task

# name -> (LoRA or full, loss on the last so many tokens of each row; None for all)
CASES: dict[str, tuple[bool, int | None]] = {
    "lora_all": (True, None),
    "lora_last16": (True, 16),
    "full_all": (False, None),
    "full_last16": (False, 16),
}
WARM_UP = 2

flags.DEFINE_list("cases", list(CASES), "What to time, separated by commas.")
flags.DEFINE_integer("steps", 5, "Timed steps of each side.", lower_bound=1)
flags.DEFINE_integer("rows", 4, "Rows per step.", lower_bound=1)
flags.DEFINE_integer("seq_len", 128, "Tokens per row.", lower_bound=17)
flags.DEFINE_integer("rank", 8, "Rank of the adapter.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of activations on both sides.")
flags.DEFINE_string("out", "runs/train_speed", "Folder for results.json and table.md.")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each timed step of both sides."""

    case: str
    ours: list[float]
    theirs: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """Ours over theirs in speed: the median over pairs of neighbouring steps, and the lowest and highest pair."""
        pairs = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return statistics.median(pairs), min(pairs), max(pairs)


def batch_of(model: Decoder, rows: int, seq_len: int, last: int | None) -> Batch:
    """Random tokens, one segment a row, the loss on all targets or on the last ones."""
    tokens_BxT = np.random.default_rng(0).integers(5, model.config.vocab_size, (rows, seq_len + 1), dtype=np.int32)
    weights_T = np.ones(seq_len + 1, np.float32)
    weights_T[: seq_len + 1 - last if last else 1] = 0
    packed = pack([Example(row, weights_T) for row in tokens_BxT], seq_len)
    return make_batch(packed, seq_len=seq_len, batch_rows=rows)


def our_step(model: Decoder, params: trees.Tree, batch: Batch, config: TrainConfig, spec: lora.Spec | None) -> Callable[[], float]:
    """The step that `training.train` runs."""
    mesh = make_mesh()
    task = Task.full(model, params, config, mesh, 1000) if spec is None else Task.lora(model, params, config, mesh, 1000, spec)
    step, state = task.compile(batch).step, [task.new_state()]

    def run() -> float:
        state[0], metrics = step(state[0], task.frozen, batch)
        return float(metrics["loss"])

    return run


def torch_model(model: Decoder, params: trees.Tree) -> transformers.Gemma3ForCausalLM:
    """The same model in transformers, with our weights."""
    c = model.config
    config = transformers.Gemma3TextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.mlp_size,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        sliding_window=c.window,
        layer_types=["sliding_attention" if s else "full_attention" for s in c.sliding],
        query_pre_attn_scalar=c.attention_scale**-2,
        max_position_embeddings=c.max_length,
        tie_word_embeddings=True,
    )
    theirs = transformers.Gemma3ForCausalLM(config)
    theirs.load_state_dict({name: torch.from_numpy(t.copy()) for name, t in hf_tensors(params, GEMMA3)}, strict=False)
    theirs.tie_weights()
    return theirs


def their_step(
    theirs: transformers.Gemma3ForCausalLM, batch: Batch, config: TrainConfig, spec: lora.Spec | None, dtype: torch.dtype
) -> Callable[[], float]:
    """The same step in PyTorch; LoRA by peft."""
    theirs = theirs.to(dtype)
    theirs.requires_grad_(True)
    theirs.get_input_embeddings().requires_grad_(False)
    if spec is not None:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets))
    inner = theirs.get_base_model() if spec is not None else theirs
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    arrays = batch.tokens_BxT, batch.places_SxN[0], batch.targets_SxN[0]
    tokens, places, targets = (torch.from_numpy(np.asarray(array)).long() for array in arrays)
    head = inner.get_output_embeddings()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        hidden = inner.model(input_ids=tokens).last_hidden_state
        logits = head(hidden.reshape(-1, hidden.shape[-1])[places]).float()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.clip_norm)
        optimizer.step()
        return float(loss)

    return run


def time_case(case: str, model: Decoder, params: trees.Tree) -> Timing:
    """Checks that both sides agree on the loss, then times their steps in turn."""
    values = flags.FLAGS
    is_lora, last = CASES[case]
    spec = lora.Spec(rank=values.rank, alpha=2.0 * values.rank) if is_lora else None
    config = TrainConfig(learning_rate=1e-5, batch_rows=values.rows, seq_len=values.seq_len, loss_chunk=512)
    batch = batch_of(model, values.rows, values.seq_len, last)
    with waiting(case, "compiling ours"):
        ours = our_step(model, params, batch, config, spec)
    with waiting(case, "building theirs"):
        theirs = their_step(torch_model(model, params), batch, config, spec, getattr(torch, values.dtype))
    seconds: tuple[list[float], list[float]] = ([], [])
    with Progress(case, values.steps + WARM_UP) as bar:
        for step in range(values.steps + WARM_UP):
            losses = []
            for run, taken in zip((ours, theirs), seconds, strict=True):
                began = time.perf_counter()
                losses.append(run())
                taken.append(time.perf_counter() - began)
            if step == 0:
                say(case, f"loss on the first batch: {losses[0]:.5f} here, {losses[1]:.5f} in torch")
                allowed = 1e-3 if values.dtype == "float32" else 0.1
                if abs(losses[0] - losses[1]) > allowed:
                    raise UserError(f"{case}: the two sides do not compute the same loss; their speeds cannot be compared")
            bar.advance(1, f"{seconds[0][-1]:.2f} s here, {seconds[1][-1]:.2f} s in torch")
    return Timing(case, seconds[0][WARM_UP:], seconds[1][WARM_UP:])


def render(timings: list[Timing]) -> str:
    values, tokens = flags.FLAGS, flags.FLAGS.rows * flags.FLAGS.seq_len
    setting = f"{values.dtype}, {values.rows} x {values.seq_len} tokens, rank {values.rank}"
    lines = [
        f"| case ({setting}) | kafjax, tokens/s | torch, tokens/s | ratio [lowest, highest pair] |",
        "|---|---:|---:|---:|",
    ]
    for timing in timings:
        ours, theirs = (tokens / statistics.median(seconds) for seconds in (timing.ours, timing.theirs))
        ratio, low, high = timing.ratio()
        lines.append(f"| {timing.case} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines) + f"\n\nMedians of {values.steps} steps that alternate in one process, {os.cpu_count()} threads each.\n"


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for case in values.cases:
        if case not in CASES:
            raise UserError(f"unknown case '{case}'. {nearest(case, CASES)}")
    torch.set_num_threads(os.cpu_count() or 1)
    use_compilation_cache()
    model, params = hub.load("gemma3-270m", dtype=DTYPES[values.dtype])
    timings = [time_case(case, model, params) for case in values.cases]
    out = Path(values.out)
    write_json(out / "results.json", {
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "flags": {name: values[name].value for name in ("steps", "rows", "seq_len", "rank", "dtype")},
        "environment": {**environment(), "torch": torch.__version__, "peft": peft.__version__, "jax_backend": jax.default_backend()},
    })
    write_atomic(out / "table.md", render(timings))
    print(f"\n{render(timings)}")


if __name__ == "__main__":
    run_main(main)
