"""`Forecast`: the steps, tokens and time of a training before it begins, from the formulas and the
speed of this machine; and anew from its own first steps."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import say
from kafjax.models import Decoder
from kafjax.ops.loss import even_chunk
from kafjax.parallel import n_data_shares
from kafjax.training.config import TrainConfig
from kafjax.training.demand import decoder_shape, training_demand
from kafjax.training.feed import Source
from kafjax.training.loop import Data, batches_of

OVERHEAD = 1.2
"""Time of a training step over that of its products and its traffic, as measured."""
SPREAD = 1.5
"""A training takes between a forecast divided by this and one multiplied by it."""
_FLOPS, _BYTES, _SECONDS = 2e9, 32e6, 0.05  # of a product and an array that are timed, and how long
_RENEW_SECONDS = 5.0
_UNITS = {"s": 1, "m": 60, "h": 3600}
_KERNEL = ("/kernel", "_experts")


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Size of a training. Compiling, checkpoints and a busy machine come on top of `seconds`."""

    steps: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        low, high = (show_seconds(self.seconds * by) for by in (1 / SPREAD, SPREAD))
        size = f"{self.steps:,} steps on {self.tokens:,} tokens"
        return f"{size}, about {show_seconds(self.seconds)} (between {low} and {high})"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of this machine at the sizes of a model: FLOP/s of products with the kernels of its
    layers and with its vocabulary, bytes/s of arrays that are read and written."""

    kernels: float
    vocabulary: float
    memory: float


def forecast(
    model: Decoder,
    variants: Data,
    config: TrainConfig,
    mesh: Mesh,
    speed: Speed,
    spec: lora.Spec | None = None,
) -> Forecast:
    """Forecasts `train(model, params, variants, config, spec=spec, mesh=mesh)`.

    Args:
      speed: of `measure`.

    Raises:
      UserError: as `train` would for data and sizes that do not fit.
    """
    batches = batches_of(variants, config, n_data_shares(mesh))
    steps = len(batches) if config.steps is None else config.steps
    tokens = sum(batches.n_tokens(step) for step in range(steps))
    return Forecast(
        steps, tokens, steps * _seconds_of_step(model, batches, steps, config, speed, spec)
    )


def _seconds_of_step(
    model: Decoder,
    batches: Source,
    steps: int,
    config: TrainConfig,
    speed: Speed,
    spec: lora.Spec | None,
) -> float:
    demand, shape = training_demand(model, config, spec), decoder_shape(model)
    tokens = config.batch_rows * config.seq_len
    a_place = (
        (6 if spec is None and not config.freeze_embedding else 4) * shape.d_model * shape.vocab
    )
    # The loss is computed at targets alone, a chunk at a time.
    shares = batches.groups * batches.accumulate
    chunk = even_chunk(batches.capacity, config.loss_chunk)
    places = shares * chunk * math.ceil(batches.n_targets(steps) / steps / shares / chunk)
    moved = 2 * (demand.state + demand.gradients) + tokens * demand.n_layers * demand.traffic
    seconds = (
        (demand.flops - a_place * tokens) / speed.kernels
        + a_place * places / speed.vocabulary
        + moved / speed.memory
    )
    return OVERHEAD * seconds


def measure(model: Decoder, config: TrainConfig, mesh: Mesh) -> Speed:
    """Times products at the shapes of a training step, and a copy, in about a second.

    A host's devices that are no accelerators share its cores: they count as one.
    """
    kernels: dict[tuple[int, ...], int] = {}
    for path, leaf in trees.flatten(model.abstract_params()["layers"]).items():
        if path.endswith(_KERNEL):
            kernels[leaf.shape[-2:]] = kernels.get(leaf.shape[-2:], 0) + math.prod(leaf.shape)
    rows = config.batch_rows // config.accumulate * config.seq_len
    rates = {shape: _rate(rows, *shape, model.dtype) for shape in kernels}
    sizes = model.config
    chunk = min(config.loss_chunk, rows)
    columns = min(sizes.vocab_size, math.ceil(_FLOPS / (2 * chunk * sizes.hidden_size)))
    device = jax.local_devices()[0]
    together = 1 if device.platform == "cpu" else mesh.size
    return Speed(
        together * sum(kernels.values()) / sum(n / rates[shape] for shape, n in kernels.items()),
        together * _rate(chunk, sizes.hidden_size, columns, model.dtype),
        together * _memory_rate(),
    )


def _rate(rows: int, inputs: int, outputs: int, dtype: jnp.dtype) -> float:
    """Measures the FLOP/s of `[rows, inputs] @ [inputs, outputs]`, with fewer rows where that would
    take long."""
    rows = max(1, min(rows, math.ceil(_FLOPS / (2 * inputs * outputs))))
    x, w = (
        jax.device_put(np.ones(shape, np.float32).astype(dtype), jax.local_devices()[0])
        for shape in ((rows, inputs), (inputs, outputs))
    )
    return 2 * rows * inputs * outputs / _timed(jax.jit(jnp.matmul), x, w)


def _memory_rate() -> float:
    """Measures the bytes/s of reading an array and writing another one."""
    x = jax.device_put(np.ones(int(_BYTES) // 4, np.float32), jax.local_devices()[0])
    return 2 * _BYTES / _timed(jax.jit(lambda x: 0.5 * x), x)


def _timed(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Measures the seconds of a call, once it is compiled."""
    function(*arguments).block_until_ready()
    began, n = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < _SECONDS:
        function(*arguments).block_until_ready()
        n += 1
    return took / n


def renewing(
    log: Callable[..., None], expected: Mapping[str, Forecast], key: str
) -> Callable[..., None]:
    """Returns a log of training steps that tells once how long a training will take, from its own
    first seconds.

    Args:
      log: takes the rows as well.
      expected: what was forecast, by the names that rows hold at `key`.
    """
    first: dict[str, tuple[float, int]] = {}
    told: set[str] = set()

    def row(**values: Any) -> None:
        log(**values)
        name, now = values[key], time.perf_counter()
        if name in told or name not in expected:
            return
        began, step = first.setdefault(name, (now, values["step"]))
        if now - began < _RENEW_SECONDS:
            return
        told.add(name)
        left = expected[name].steps - values["step"]
        a_step = (now - began) / (values["step"] - step)
        if left > 0:
            say(
                name,
                f"{a_step:.2g} s a step as measured: about {show_seconds(left * a_step)} left, "
                f"{show_seconds(expected[name].steps * a_step)} in all ({show_seconds(expected[name].seconds)} forecast)",
            )

    return row


def read_seconds(text: str) -> float:
    """Reads a time such as `90s`, `20m` or `1.5h`. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smh])", text)
    if match is None or not float(match[1]):
        raise UserError(f"'{text[:40]}' is no time; write 90s, 20m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


def show_seconds(seconds: float) -> str:
    """Shows a time in two digits and its largest unit: `95 s`, `12 min`, `4.4 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    if value < 1:
        return "1"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):g}"
