"""Full fine-tuning and LoRA, each over its own range of learning rates: losses only, nothing is
asked."""

from __future__ import annotations

from experiments.configs.finetune import Finetune
from launch.spec import Sweep, chain, logspace, product

full = product(method=["full"], lr=logspace(-5, -3, 5))
adapter = product(method=["lora"], rank=[4, 16], lr=logspace(-4, -2, 5))
sweep = Sweep(Finetune(), product(chain(full, adapter), seed=range(3)))
