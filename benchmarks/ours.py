"""kafjax's sides: the work of `benchmarks.work` by kafjax. Imports no peer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side import Side
from benchmarks.work import LEARNING_RATE, PROMPT, TARGETS, TrainWork, texts_of, tokens_of
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.evaluation import cost
from kafjax.generation import Generator, Sampling
from kafjax.generation.decode import decode, first_token, prefill
from kafjax.models import Decoder
from kafjax.parallel import make_mesh, shard
from kafjax.retrieval import Embedder
from kafjax.training import Example, TrainConfig
from kafjax.training.batches import Batch, make_batch, pack
from kafjax.training.demand import decoder_shape
from kafjax.training.lane_state import drawn, padded
from kafjax.training.lane_step import LaneInputs, LaneTask, optimizer_of
from kafjax.training.step import batch_sharding, new_state
from kafjax.training.task import Task

FREE = 16  # tokens that a prefilled cache has room for
Step = Callable[[], tuple[float, float]]
"""One optimizer step, done when it returns; gives the loss before it and the norm of the gradient
before clipping."""


def train(folder: str, **work: object) -> Side:
    """Training steps; a LoRA's first adapter is saved to `adapter` for the peer."""
    adapter = work.pop("adapter")
    job = TrainWork(**work)
    # what trains in full is kept in param_dtype; beside an adapter the base lies in `dtype`
    kept = job.dtype if job.rank else job.param_dtype
    model, params = hub.load(folder, dtype=jnp.dtype(job.dtype), param_dtype=jnp.dtype(kept))
    tokens_BxT1 = tokens_of(folder, job.rows, job.seq_len + 1)
    step = train_step(model, params, tokens_BxT1, job, adapter)
    facts = {"units": job.rows * job.seq_len, "flops": train_flops(model, job)}
    return Side(lambda: np.array(step()), facts)


def train_step(
    model: Decoder,
    params: trees.Tree,
    tokens_BxT1: np.ndarray,
    work: TrainWork,
    adapter: str | None = None,
) -> Step:
    """kafjax's own training step, compiled. The first adapter goes to the new folder `adapter`, in
    PEFT's form."""
    mesh = make_mesh()
    config = TrainConfig(
        steps=work.steps,
        learning_rate=LEARNING_RATE,
        warmup_fraction=0.0,
        floor_fraction=1.0,  # a constant rate, as torch's
        batch_rows=work.rows,
        seq_len=work.seq_len,
        freeze_embedding=True,
        param_dtype="float32" if work.rank else work.param_dtype,
        remat=work.remat,
        loss_chunk=512,
    )
    batch = loss_batch(tokens_BxT1, work.n_last)
    if work.rank:
        spec = adapter_spec(work.rank)
        task = Task.lora(model, params, config, mesh, work.steps, spec)
    else:
        task = Task.full(model, params, config, mesh, work.steps)
    compiled, state = task.compile(batch), task.new_state()
    if work.rank and adapter:
        hub.save_peft(adapter, state.trainable, spec, model, params)
    batch = shard(batch, batch_sharding(mesh))

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled.step(state, task.frozen, batch))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return step


def train_flops(model: Decoder, work: TrainWork) -> float:
    """Arithmetic of a step by formula, nothing computed twice counted."""
    shape, tokens = decoder_shape(model), work.rows * work.seq_len
    if not work.rank:
        return cost.train_flops_full(
            shape, tokens, work.n_targets, work.seq_len, embedding_trained=False
        )
    n_adapter = trees.count(lora.abstract(adapter_spec(work.rank), model.abstract_params()))
    return cost.train_flops_lora(
        shape, tokens, work.n_targets, work.seq_len, adapter_params=n_adapter
    )


def adapter_spec(rank: int) -> lora.Spec:
    return lora.Spec(rank, 2.0 * rank, rf"({'|'.join(TARGETS)})")


def loss_batch(tokens_BxT1: np.ndarray, n_last: int | None) -> Batch:
    """Rows of one text each; the loss looks at every token, or at the last `n_last` of each row."""
    B, T1 = tokens_BxT1.shape
    weights = np.ones(T1, np.float32)
    weights[: 1 if n_last is None else T1 - n_last] = 0
    examples = [Example(tokens, weights) for tokens in tokens_BxT1]
    return make_batch(pack(examples, T1 - 1), seq_len=T1 - 1, batch_rows=B)


def lanes(folder: str, n: int, rows: int, seq_len: int, rank: int, steps: int) -> Side:
    """Trains `n` adapters as lanes of one program: compiling, and all steps. Gives the losses of
    the first and the last step, `[2, n]`."""
    model, params = hub.load_decoder(folder)
    tokens_NxBxT1 = tokens_of(folder, n, rows, seq_len + 1)
    spec = adapter_spec(rank)
    config = TrainConfig(
        steps=steps,
        floor_fraction=1.0,  # a constant rate, as torch's
        batch_rows=rows,
        seq_len=seq_len,
        freeze_embedding=True,
        loss_chunk=512,
    )

    def run() -> np.ndarray:
        batches = [loss_batch(tokens_BxT1, None) for tokens_BxT1 in tokens_NxBxT1]
        shapes = lora.lanes.padded_shapes([spec], params)
        task = LaneTask.build(model, params, config, make_mesh(), shapes, n)
        program = task.compile(*task.abstract_inputs(batches[0]))
        scales = {
            path: np.broadcast_to(scale, (n, *scale.shape))
            for path, scale in lora.lanes.scales(spec, params, shapes).items()
        }
        inputs = task.shard_inputs(
            LaneInputs(
                scales,
                np.full(n, LEARNING_RATE, np.float32),
                np.zeros(n, np.int32),
                np.full(n, steps, np.int32),
                np.ones(n, bool),
            )
        )
        batch = shard(jax.tree.map(lambda *x: np.stack(x), *batches), task.batch_sharding())
        state, losses = task.empty(), []
        for lane in range(n):
            adapters = drawn(dataclasses.replace(spec, alpha=1.0), model, jax.random.key(lane))
            own = padded(new_state(adapters, optimizer_of(config)), shapes)
            state = task.put(state, np.int32(lane), own)
        for _ in range(steps):
            state, metrics = program.step(state, task.frozen, inputs, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return np.stack([np.asarray(losses[0]), np.asarray(losses[-1])])

    work = TrainWork(rows, seq_len, rank=rank)
    facts = {"units": n * steps * rows * seq_len, "flops": n * steps * train_flops(model, work)}
    return Side(run, facts)


def answering(folder: str, kind: str, dtype: str, batch: int, length: int, n_new: int) -> Side:
    """`kind` prefill or decode of `batch` prompts of `length` tokens."""
    model, params = hub.load(folder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    prompts_BxT = tokens_of(folder, batch, length)
    shape = decoder_shape(model)
    if kind == "prefill":
        flops = batch * cost.query_flops(shape, length, 1)
        return Side(
            our_prefill(model, params, prompts_BxT), {"units": batch * length, "flops": flops}
        )
    flops = batch * cost.query_flops(shape, length, n_new)
    facts = {"units": batch * n_new, "flops": flops, "bytes": n_new * trees.n_bytes(params)}
    return Side(our_decode(model, params, prompts_BxT, n_new), facts)


def our_prefill(
    model: Decoder, params: trees.Tree, prompts_BxT: np.ndarray
) -> Callable[[], np.ndarray]:
    length_B = np.full(len(prompts_BxT), prompts_BxT.shape[1], np.int32)

    def run() -> np.ndarray:
        last_BxD, cache = prefill(
            model, params, prompts_BxT, length_B, None, np.int32(0), n_free=FREE
        )
        logits_BxV = _logits(model, params, last_BxD)
        return np.asarray(jax.block_until_ready((logits_BxV, cache))[0])

    run()
    return run


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Decoder, params: trees.Tree, last_BxD: jax.Array) -> jax.Array:
    return model.logits(params, last_BxD)


def our_decode(
    model: Decoder, params: trees.Tree, prompts_BxT: np.ndarray, n_new: int
) -> Callable[[], np.ndarray]:
    B, T = prompts_BxT.shape
    length_B, number_B = np.full(B, T, np.int32), np.arange(B, dtype=np.int32)
    greedy = Sampling(max_new_tokens=n_new).distribution()
    never_V = jnp.zeros(model.config.vocab_size, bool)  # replies of one length on both sides

    def run() -> np.ndarray:
        last_BxD, cache = prefill(
            model, params, prompts_BxT, length_B, None, np.int32(0), n_free=n_new
        )
        key = jax.random.key(0)
        state = first_token(
            model, params, last_BxD, length_B, number_B, key, never_V, n_new, greedy
        )
        state, _ = decode(model, params, state, cache, never_V, np.int32(n_new), greedy)
        return np.asarray(state.out_BxN)

    run()
    return run


def embedding(words: int, texts: int, dtype: str) -> Side:
    """Vectors of MiniLM, from texts."""
    model, params = hub.load("minilm")
    tokenizer, drawn = hub.tokenizer("minilm"), texts_of(words, texts)
    embed = Embedder(model, params, tokenizer, dtype=dtype).embed
    kernels = {path: x for path, x in trees.flatten(params).items() if path.endswith("kernel")}
    blocks = sum(x.size for path, x in kernels.items() if path.startswith("layers/"))
    config, lengths = model.config, [len(e.ids) for e in tokenizer.encode_batch(drawn)]
    mean = sum(lengths) / len(lengths)
    flops = cost.encoder_flops(blocks, config.n_layers, config.hidden_size, sum(lengths), mean)
    return Side(lambda: embed(drawn), {"units": texts, "flops": flops})


def first_token_of(folder: str, dtype: str) -> Side:
    """Loads weights from a folder and makes the first token of a reply."""

    def run() -> np.ndarray:
        model, params = hub.load(folder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        generator = Generator(model, hub.tokenizer(folder))
        (reply,) = generator.generate(params, [PROMPT], Sampling(max_new_tokens=1))
        return np.array([reply.text])

    return Side(run, {"units": 1})
