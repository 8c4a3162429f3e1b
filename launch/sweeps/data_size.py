"""Number of subjects x seed: how each way to add knowledge holds up as there is more to know."""

from __future__ import annotations

from experiments.configs.compare import Compare
from kafjax.core.config import changed
from launch.spec import Sweep, product

sweep = Sweep(
    changed(Compare(), methods=("base", "full", "lora", "rag"), latency_queries=0),
    product(subjects=[8, 16, 32, 64, 128], seed=range(3)),
)
