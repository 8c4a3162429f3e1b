"""A workshop with a tiny model, a tiny encoder and a tiny corpus, in this process."""

from __future__ import annotations

import contextlib

import pytest

from kafjax import hub
from kafjax.core.config import changed
from kafjax.corpus import load_folder
from kafjax.methods import Lab, Settings
from kafjax.parallel import make_mesh
from tests import tiny


class Quiet(contextlib.nullcontext):
    """A progress bar that shows nothing."""

    def advance(self, n: int) -> None:
        pass

    def __enter__(self):
        return self


SETTINGS = changed(
    Settings(),
    **{
        "epochs": 4,
        "lr_lora": 1e-2,
        "rank": 4,
        "batch_rows": 4,
        "seq_len": 64,
        "checkpoint_every": 0,
    },
    **{"k": 2, "engine": "exact", "max_new_tokens": 4, "hyde_tokens": 6},
)


@pytest.fixture(scope="session")
def make_lab(tmp_path_factory):
    """`make_lab(epochs=1, ...)`: a lab with a folder of its own, and `logged`, the rows that went
    to its log."""
    root = tmp_path_factory.mktemp("lab")
    gemma, bert = str(tiny.write_gemma(root / "gemma")), str(tiny.write_bert(root / "bert"))
    corpus = load_folder(tiny.write_corpus(root / "corpus"))
    model, params = hub.load(gemma)
    tokenizer = hub.tokenizer(gemma)

    def make(**settings) -> tuple[Lab, list[dict]]:
        logged: list[dict] = []
        lab = Lab(
            model=model,
            params=params,
            mesh=make_mesh(),
            tokenizer=tokenizer,
            corpus=corpus,
            settings=changed(SETTINGS, embedder=bert, **settings),
            folder=tmp_path_factory.mktemp("artifacts"),
            log=lambda **row: logged.append(row),
            progress=lambda label, total: Quiet(),
        )
        return lab, logged

    return make


@pytest.fixture(scope="session")
def lab(make_lab) -> Lab:
    """One that only untrained methods use."""
    return make_lab()[0]
