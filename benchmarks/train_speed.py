"""Training speed beside torch: tokens/s of the full and the LoRA step, kafjax and torch + transformers + peft in turns.

    python -m benchmarks.train_speed                                 four cases, Gemma 3 270M, float32
    python -m benchmarks.train_speed --dtype=bfloat16 --steps=20     other numbers, longer
    python -m benchmarks.train_speed --cases=lora_last16 --rank=64   one case

Both sides get the same weights, tokens and threads and do the same work: forward, backward, clipping by global norm, AdamW, embedding
frozen (and with it the tied head), logits only where the loss looks. That last point favours torch: its own training would compute
logits everywhere, so here the hidden states are picked before the head. torch runs eagerly with its fused AdamW and its own choice of
attention. In bfloat16 what trains is float32 on both sides (torch: autocast) and what is frozen is bfloat16.

First both losses, and in full fine-tuning both gradient norms, are compared: a difference above 1e-3 (float32) ends the benchmark.
Then the sides take turns, the first turn alternating, with a rest between so that no thread pool still spins in the other's time.
The ratio is that of the median step times; its interval is a 95% bootstrap over rounds. Writes OUT/train_speed.json and .md.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from absl import flags

from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.corpus import biographies
from kafjax.evaluation import table
from kafjax.hub import names
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Decoder, DecoderConfig
from kafjax.parallel import make_mesh, shard
from kafjax.training import Example, TrainConfig
from kafjax.training.batches import Batch, make_batch, pack
from kafjax.training.step import batch_sharding
from kafjax.training.task import Task

CASES = {
    "lora_all": ("LoRA, loss on all tokens", True, None),
    "lora_last16": ("LoRA, loss on the last 16", True, 16),
    "full_all": ("full, loss on all tokens", False, None),
    "full_last16": ("full, loss on the last 16", False, 16),
}
DTYPES = {"float32": (jnp.float32, torch.float32), "bfloat16": (jnp.bfloat16, torch.bfloat16)}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
LEARNING_RATE = 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
REST_SECONDS = 0.3  # OpenMP threads spin for 0.2 s after their work


Step = Callable[[], tuple[float, float]]
"""One optimizer step, done when it returns; gives the loss before it and the norm of the gradient before clipping."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One side of a case: seconds of each measured step, `[rounds]`; losses and gradient norms of all steps, warm-up included."""

    seconds: np.ndarray
    losses: np.ndarray
    norms: np.ndarray


def define_flags() -> None:
    """Not at import: tests import several benchmarks, whose flags share names."""
    flags.DEFINE_string("model", "gemma3-270m", "Language model: gemma3-270m, or a folder of a Gemma 3.")
    flags.DEFINE_list("cases", list(CASES), f"What is measured: {', '.join(CASES)}.")
    flags.DEFINE_integer("steps", 10, "Steps measured of each side and case.", lower_bound=1)
    flags.DEFINE_integer("warmup", 2, "Steps before those.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Rows per step.", lower_bound=1)
    flags.DEFINE_integer("seq_len", 128, "Tokens per row.", lower_bound=17)
    flags.DEFINE_integer("rank", 8, "LoRA: rank of the adapter; alpha is twice that.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of activations and of frozen weights.")
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    for case in values.cases:
        if case not in CASES:
            raise UserError(f"unknown case '{case}'. {nearest(case, CASES)}")
    torch.set_num_threads(os.cpu_count() or 1)
    with waiting("model", f"loading {values.model}"):
        model, params = hub.load(values.model, dtype=DTYPES[values.dtype][0])
        if not isinstance(model, Decoder):
            raise UserError(f"--model={values.model} is an encoder; a language model is needed")
        tokens_BxT1 = sample_tokens(hub.tokenizer(values.model), values.rows, values.seq_len)
    rows = {}
    for case in values.cases:
        rows[case] = row = summary(**measure(case, model, params, tokens_BxT1), tokens=values.rows * values.seq_len)
        say(case, f"{row['ratio']['value']:.2f} times torch [{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}]")
    settings = {name: values[name].value for name in ("model", "rows", "seq_len", "rank", "dtype", "steps", "warmup")}
    settings["threads"] = torch.get_num_threads()
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    text = table.render([speed_table(rows)], [_listed(settings), _listed({**versions, "jax": jax.__version__})])
    result = {"settings": settings, "cases": rows, "environment": environment(), "peers": versions}
    write_json(Path(values.out) / "train_speed.json", result)
    write_atomic(Path(values.out) / "train_speed.md", text)
    print(f"\n{text}")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def measure(case: str, model: Decoder, params: trees.Tree, tokens_BxT1: np.ndarray) -> dict[str, Measured]:
    """Runs both sides of a case, `ours` and `theirs`, in turns.

    Raises `UserError` if their losses or gradients differ: they would not be doing the same work.
    """
    _, adapter, n_last = CASES[case]
    values = flags.FLAGS
    batch = loss_batch(tokens_BxT1, n_last)
    with waiting(case, "compiling and preparing both sides"):
        sides = {"ours": jax_step(model, params, batch, adapter), "theirs": torch_step(model.config, params, batch, adapter)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with Progress(case, values.warmup + values.steps, unit="round") as bar:
        for round_ in range(values.warmup + values.steps):
            for name in list(sides)[:: 1 if round_ % 2 else -1]:
                time.sleep(REST_SECONDS)
                began = time.perf_counter()
                results[name].append(sides[name]())
                seconds[name].append(time.perf_counter() - began)
            if round_ == 0:
                check_same_work(case, results["ours"][0], results["theirs"][0])
            bar.advance(1, f"kafjax {seconds['ours'][-1]:.2f} s, torch {seconds['theirs'][-1]:.2f} s")
    sides.clear()
    gc.collect()
    return {name: Measured(np.array(seconds[name][values.warmup :]), *np.array(results[name]).T) for name in seconds}


def check_same_work(case: str, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    say(case, f"first loss: kafjax {ours[0]:.6f}, torch {theirs[0]:.6f}; gradient norm: kafjax {ours[1]:.5f}, torch {theirs[1]:.5f}")
    tolerance = TOLERANCE[flags.FLAGS.dtype]
    same = abs(ours[0] - theirs[0]) <= tolerance
    if not CASES[case][1]:  # each side draws its adapters, and their gradient depends on the draw
        same = same and abs(ours[1] / theirs[1] - 1) <= tolerance
    if not same:
        raise UserError(f"{case}: losses or gradients differ by more than {tolerance:g}; the two sides do not do the same work")


def sample_tokens(tokenizer: Any, rows: int, seq_len: int) -> np.ndarray:
    """Ordinary text, int32 `[rows, seq_len + 1]`."""
    n = rows * (seq_len + 1)
    ids = tokenizer.encode(" ".join(document.text for document in biographies(2 + n // 128).documents)).ids
    return np.resize(np.array(ids, np.int32), (rows, seq_len + 1))


def loss_batch(tokens_BxT1: np.ndarray, n_last: int | None) -> Batch:
    """Rows of one text each; the loss looks at every token, or at the last `n_last` of each row."""
    B, T1 = tokens_BxT1.shape
    weights = np.ones(T1, np.float32)
    weights[: 1 if n_last is None else T1 - n_last] = 0
    examples = [Example(tokens, weights) for tokens in tokens_BxT1]
    return make_batch(pack(examples, T1 - 1), seq_len=T1 - 1, batch_rows=B)


def jax_step(model: Decoder, params: trees.Tree, batch: Batch, adapter: bool) -> Step:
    """kafjax's own training step, compiled."""
    values, mesh = flags.FLAGS, make_mesh()
    n_steps = values.warmup + values.steps
    config = TrainConfig(
        steps=n_steps,
        learning_rate=LEARNING_RATE,
        warmup_fraction=0.0,
        floor_fraction=1.0,  # a constant rate, as torch's
        batch_rows=values.rows,
        seq_len=values.seq_len,
        freeze_embedding=True,
        loss_chunk=512,
    )
    if adapter:
        task = Task.lora(model, params, config, mesh, n_steps, lora.Spec(values.rank, 2.0 * values.rank, rf"({'|'.join(TARGETS)})"))
    else:
        task = Task.full(model, params, config, mesh, n_steps)
    compiled, state = task.compile(batch), task.new_state()
    batch = shard(batch, batch_sharding(mesh))

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled.step(state, task.frozen, batch))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return step


def torch_step(config: DecoderConfig, params: trees.Tree, batch: Batch, adapter: bool) -> Step:
    """The same step in torch, with peft for LoRA."""
    dtype = DTYPES[flags.FLAGS.dtype][1]
    model = hf_model(config, params)
    if adapter:
        rank = flags.FLAGS.rank
        model = model.to(dtype)
        peft_config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), lora_dropout=0.0)
        peft.get_peft_model(model, peft_config)  # adapts `model` in place; adapters are float32
    else:
        embedding = model.model.embed_tokens.weight.requires_grad_(False)  # the head is the same tensor
        embedding.data = embedding.data.to(dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens_BxT = torch.from_numpy(batch.tokens_BxT).long()
    places_N, targets_N = torch.from_numpy(batch.places_SxN[0]).long(), torch.from_numpy(batch.targets_SxN[0]).long()
    model.train()

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden_BxTxD = model.model(input_ids=tokens_BxT, use_cache=False).last_hidden_state
            logits_NxV = model.lm_head(hidden_BxTxD.flatten(0, 1)[places_N])
        loss = torch.nn.functional.cross_entropy(logits_NxV.float(), targets_N)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item(), norm.item()

    return step


def hf_model(config: DecoderConfig, params: trees.Tree) -> transformers.Gemma3ForCausalLM:
    """transformers' Gemma 3 in float32 with our weights. Raises `ValueError` for a weight that has no place on the other side."""
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding]
    scaling = {"rope_type": "default"} if config.rope_factor == 1 else {"rope_type": "linear", "factor": config.rope_factor}
    hf_config = transformers.Gemma3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        layer_types=kinds,
        sliding_window=config.window,
        query_pre_attn_scalar=round(config.attention_scale**-2),
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_length,
        rope_parameters={
            "full_attention": {**scaling, "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_sliding},
        },
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    model = transformers.Gemma3ForCausalLM(hf_config)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in hf_tensors(params, names.GEMMA3)}
    result = model.load_state_dict(tensors, strict=False)
    if result.unexpected_keys or set(result.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"weights without a place: {result.unexpected_keys}, places without a weight: {result.missing_keys}")
    model.tie_weights()
    return model


def summary(ours: Measured, theirs: Measured, tokens: int) -> dict[str, Any]:
    """Tokens/s of both sides (median, slowest, fastest step) and the ratio with its interval."""

    def side(measured: Measured) -> dict[str, float]:
        seconds = measured.seconds
        rates = {"median": tokens / np.median(seconds), "min": tokens / seconds.max(), "max": tokens / seconds.min()}
        losses = {"first_loss": measured.losses[0], "last_loss": measured.losses[-1], "first_gradient_norm": measured.norms[0]}
        return {name: float(value) for name, value in {**rates, **losses}.items()}

    pairs_Rx2 = np.stack([theirs.seconds, ours.seconds], axis=1)
    drawn_KxRx2 = pairs_Rx2[np.random.default_rng(0).integers(0, len(pairs_Rx2), (10_000, len(pairs_Rx2)))]
    low, high = np.percentile(_ratio(drawn_KxRx2), [2.5, 97.5])
    return {
        "ours": side(ours),
        "theirs": side(theirs),
        "ratio": {"value": float(_ratio(pairs_Rx2)), "low": float(low), "high": float(high), "n": len(pairs_Rx2)},
    }


def _ratio(seconds: np.ndarray) -> np.ndarray:
    """Median torch time over our median time, from `[.., R, 2]`: above 1, kafjax is faster."""
    medians = np.median(seconds, axis=-2)
    return medians[..., 0] / medians[..., 1]


def speed_table(rows: Mapping[str, Mapping[str, Any]]) -> table.Table:
    def speed(side: Mapping[str, float]) -> str:
        return f"{side['median']:.0f} [{side['min']:.0f}, {side['max']:.0f}]"

    def cells(case: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        speeds = [speed(row[side]) for side in ("ours", "theirs")]
        ratio = row["ratio"]
        return CASES[case][0], *speeds, f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"

    return table.Table(
        "Training speed, tokens/s",
        ("step", "kafjax", "torch", "kafjax / torch"),
        tuple(cells(case, row) for case, row in rows.items()),
        (
            "Median step [slowest, fastest]; ratio of the medians [95% bootstrap over rounds]. The sides took turns in one process.",
            "Same weights, tokens, losses, threads and work: embedding frozen, logits only where the loss looks, on both sides.",
        ),
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
