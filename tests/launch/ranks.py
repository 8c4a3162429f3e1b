"""A sweep over rank, rate and seed that takes minutes on two cores: its model, corpus and spec.

python -m tests.launch.ranks FOLDER      writes FOLDER/model (random weights), FOLDER/corpus and FOLDER/ranks.yaml
python -m launch.sweep FOLDER/ranks.yaml --folder=FOLDER/sweep
python -m experiments.report --folder=FOLDER/sweep/runs --out=FOLDER/report
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests import tiny

AXES = {"rank": [1, 4, 16], "lr": [1e-3, 3e-3, 1e-2, 3e-2], "seed": {"range": 3}}
SIZES = {"steps": 120, "batch_rows": 2, "seq_len": 64, "alpha": 8}


def main(folder: Path) -> None:
    model, corpus = str(folder / "model"), str(folder / "corpus")
    tiny.write_gemma(Path(model), hidden_size=64, intermediate_size=128)
    tiny.write_corpus(Path(corpus))
    spec = {"experiment": "finetune", "base": {"model": model, "corpus": corpus, **SIZES}}
    (folder / "ranks.yaml").write_text(yaml.safe_dump({**spec, "runs": {"product": AXES}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
