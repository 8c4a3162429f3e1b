"""A model and a corpus small enough for a sweep over rank, rate and seed in minutes.

python -m tests.launch.ranks FOLDER      writes FOLDER/model, random weights, and FOLDER/corpus, two facts of six people
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests import tiny

FACTS = (("Where was {} born?", tiny.TOWNS), ("What does {} make?", tiny.CRAFTS))


def main(folder: Path) -> None:
    rows = []
    for i, name in enumerate(tiny.PEOPLE):
        for text, answers in FACTS:
            for split in ("train", "seen"):
                row = {"id": f"q{len(rows)}", "split": split, "passages": [f"doc{i}"]}
                rows.append({**row, "question": text.format(name), "golden_answers": [answers[i]]})
    tiny.write_gemma(folder / "model", hidden_size=64, intermediate_size=128)
    tiny.write_corpus(folder / "corpus", questions=rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
