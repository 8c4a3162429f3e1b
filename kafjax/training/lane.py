"""A lane of a sweep, before and after its training: its settings, when it stops, and its result."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.training.batches import Example
from kafjax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Lane:
    """One adapter of a sweep, by the settings in which lanes may differ. `name` is a unique folder
    name."""

    name: str
    spec: lora.Spec
    learning_rate: float
    seed: int = 0

    def config(self, shared: TrainConfig) -> TrainConfig:
        """Configuration of the same adapter trained alone."""
        return dataclasses.replace(shared, learning_rate=self.learning_rate, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Early stopping: a lane leaves when its loss on `examples`, computed every `every` steps, has
    not improved for `patience` times."""

    examples: Sequence[Example]
    every: int = 20
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class LaneResult:
    """Result of a lane.

    Attributes:
      adapters: at its own rank, as `train` would have given them.
      curve: a dict a step, as of `train`.
      checks: `{"step", "loss"}` of each look at the examples of `EarlyStop`.
      ending: finished, stopped (early) or diverged (its loss was no longer finite; the others go
        on).
      tokens: trained on, padding not counted.
      seconds, compile_seconds: its share of the steps' and of the compiler's.
      peak_memory_bytes: of the process, for all lanes together.
      lanes: number of lanes that shared the program.
    """

    adapters: lora.Adapters
    curve: list[dict[str, float]]
    checks: list[dict[str, float]]
    ending: str
    tokens: int
    seconds: float
    compile_seconds: float
    peak_memory_bytes: int
    lanes: int


def check_lanes(params: trees.Tree, config: TrainConfig, lanes: Sequence[Lane]) -> None:
    """Raises what `train_lanes` would raise for invalid lanes."""
    if not lanes:
        raise UserError("there are no lanes to train: the list is empty")
    if (config.optimizer, config.param_dtype) != ("adamw", "float32"):
        given = f"{config.param_dtype} with {config.optimizer}"
        raise UserError(
            f"lanes train in float32 with adamw, not in {given}; train such adapters alone"
        )
    for name, count in collections.Counter(lane.name for lane in lanes).items():
        if count > 1:
            raise UserError(f"two lanes are named '{name}'")
    for lane in lanes:
        lane.config(config)
        lora.lanes.check(lane.spec)
        lora.abstract(lane.spec, params)
