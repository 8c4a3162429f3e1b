"""Variants of LoRA, each at its own best rate: every variant at every rate, on three seeds.

The report chooses each variant's rate (`--choose=lr_lora`) on one half of the subjects and states
the result on the other half.
"""

from __future__ import annotations

from experiments.configs.compare import Compare
from kafjax.core.config import changed
from launch.spec import Sweep, logspace, product

sweep = Sweep(
    changed(Compare(), methods=("lora", "rslora", "dora", "pissa", "olora"), latency_queries=0),
    product(lr_lora=logspace(-4, -2, 5), seed=range(3)),
)
