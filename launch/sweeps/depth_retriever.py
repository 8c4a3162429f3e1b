"""Number of passages in the prompt x retriever, with no training: what reading more buys, and what
finding better does."""

from __future__ import annotations

from experiments.configs.compare import Compare
from kafjax.core.config import changed
from launch.spec import Sweep, product

sweep = Sweep(
    changed(Compare(), methods=("oracle", "rag", "hyde")),
    product(k=[1, 2, 5, 10, 20], retriever=["dense", "lexical", "hybrid"], seed=range(3)),
)
