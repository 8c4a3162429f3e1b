"""`Forecast`: the steps, tokens and time of a training before it begins, from the formulas and the
speed of this machine."""

from __future__ import annotations

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from kafjax.parallel import n_data_shares
from kafjax.training.config import TrainConfig
from kafjax.training.demand import training_demand
from kafjax.training.loop import Data, batches_of

SHARE = 0.5
"""Share of the rate of large products that a training step reaches, roughly: norms, attention and
the optimizer take the rest."""
_SIDE, _SECONDS = 1024, 0.2
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Size of a training. Of `seconds` expect half or twice as many: compiling, checkpoints and a
    busy machine come on top."""

    steps: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.steps:,} steps on {self.tokens:,} tokens, about {show_seconds(self.seconds)}"


def forecast(
    model: Decoder,
    variants: Data,
    config: TrainConfig,
    mesh: Mesh,
    rate: float,
    spec: lora.Spec | None = None,
) -> Forecast:
    """Forecasts `train(model, params, variants, config, spec=spec, mesh=mesh)`.

    Args:
      rate: FLOP/s of large products, `matmul_rate`.

    Raises:
      UserError: as `train` would for data and sizes that do not fit.
    """
    batches = batches_of(variants, config, n_data_shares(mesh))
    steps = len(batches) if config.steps is None else config.steps
    tokens = sum(batches.n_tokens(step) for step in range(steps))
    return Forecast(
        steps, tokens, steps * training_demand(model, config, spec).flops / (SHARE * rate)
    )


def matmul_rate(dtype: jnp.dtype, mesh: Mesh) -> float:
    """Measures the FLOP/s of products of matrices of 1,024 x 1,024 on all devices of a mesh, in a
    fraction of a second.

    A host's devices that are no accelerators share its cores: they count as one.
    """
    device = jax.local_devices()[0]
    x = jax.device_put(np.ones((_SIDE, _SIDE), np.float32).astype(dtype), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    began, n = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < _SECONDS:
        product(x, x).block_until_ready()
        n += 1
    return n * 2 * _SIDE**3 / took * (1 if device.platform == "cpu" else mesh.size)


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
