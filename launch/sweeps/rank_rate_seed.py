"""Rank x learning rate x seed of a LoRA adapter: 60 trainings, each asked the same questions.

python -m launch.sweep rank_rate_seed --dry_run
python -m launch.sweep rank_rate_seed --set=corpus=DIR --set=model=gemma3-270m
"""

from __future__ import annotations

from experiments.configs.compare import Compare
from kafjax.core.config import changed
from launch.spec import Sweep, logspace, product

sweep = Sweep(
    changed(Compare(), methods=("lora",), latency_queries=0),
    product(rank=[1, 4, 16, 64], lr_lora=logspace(-4, -2, 5), seed=range(3)),
)
