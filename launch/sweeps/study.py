"""The study of docs/protocol.md: all methods at three rates of training, five seeds, one corpus.

The report chooses the rates of each method on one half of the subjects (`--choose=lr_lora,lr_full`)
and states the result on the other half; with `--most_forgotten=0.1` among the rates that forget
little.
"""

from __future__ import annotations

from experiments.configs.compare import Compare
from kafjax.core.config import changed
from launch.spec import Sweep, product, zip_

rates = zip_(lr_lora=[3e-4, 1e-3, 3e-3], lr_full=[3e-5, 1e-4, 3e-4])
sweep = Sweep(
    changed(Compare(), subjects=24, corpus_seed=0, latency_queries=0),
    product(rates, seed=range(5)),
)
