"""Corpora through TFDS and Grain, without TensorFlow: our own builders, and the public datasets'
records."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kafjax.core.errors import UserError
from kafjax.corpus import biographies, factbook, load
from kafjax.corpus.srd import read, srd
from kafjax.corpus.tfds_in import generated_builder, load_tfds
from kafjax.corpus.tfds_rows import corpus_of, corpus_rows
from tests.corpus import srd_database
from tests.experiments.commands import ROOT

tfds = pytest.importorskip(
    "tensorflow_datasets", reason="TensorFlow Datasets is not installed (extra [data])"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All builders prepared."""
    from kafjax.corpus.builders.generated import Counts
    from kafjax.corpus.builders.srd_dataset_builder import SrdCounts

    folder = tmp_path_factory.mktemp("tfds")
    database = srd_database.write(folder / "srd.sqlite3")
    for name, counts in (
        ("biographies", Counts(n_subjects=4)),
        ("factbook", Counts(n_subjects=3, n_attributes=2, n_documents=1, seed=5)),
        ("srd", SrdCounts(n_subjects=4, n_documents=2, source=str(database))),
    ):
        generated_builder(name, counts, folder).download_and_prepare()
    return folder


@pytest.fixture
def at_hand(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


def test_builders_give_back_what_was_generated(at_hand, data_dir):
    assert load_tfds("tfds:biographies") == biographies(4)
    assert load_tfds("tfds:factbook/3x2_documents1_questions2_seed5") == factbook(3, 2, 1, seed=5)
    assert load_tfds("tfds:srd") == srd(read(data_dir / "srd.sqlite3"), 4, n_documents=2)
    (about,) = (data_dir / "srd").glob("*/*/dataset_info.json")
    assert srd_database.ATTRIBUTION in about.read_text()  # as the licence wants it
    # attached as to any corpus
    assert load("tfds:biographies", n_retention=2, n_held_out=1).retention


def test_files_are_array_records(at_hand, data_dir):
    files = [path for path in data_dir.rglob("*-of-*") if path.is_file()]
    assert files and all(".array_record-" in path.name for path in files)


def test_rows_keep_every_field():
    corpus = load("biographies", n_subjects=2, n_retention=2, n_held_out=1)
    assert corpus.replay_texts and corpus.held_out_texts and corpus.replay_questions
    assert corpus_of("biographies", corpus_rows(corpus)) == corpus


@pytest.mark.parametrize(
    "name", ["squad", "trivia_qa", "trivia_qa/rc.nocontext", "natural_questions_open"]
)
def test_public_datasets_become_records(name):
    with tfds.testing.mock_data(num_examples=3):
        corpus = load_tfds(f"tfds:{name}@train")
    asked = [question for question in corpus.questions if question.split == "untrained"]
    assert len(asked) + len(corpus.training_questions) == 3
    assert all(question.answers for question in (*corpus.questions, *corpus.training_questions))
    assert len(corpus.questions) == 3  # those that are trained on are asked again
    known = {passage.id for passage in corpus.passages}
    if name == "squad":
        assert len(corpus.documents) == 3 and all(
            set(question.passages) <= known and question.passages for question in corpus.questions
        )
    if name == "natural_questions_open":
        assert not corpus.documents


def test_gold_passages_of_squad_are_those_that_hold_an_answer():
    rain = "It rains a lot there, and the wind blows from the north all day. "
    context = f"The town lies on the Ost. {12 * rain}Its mayor is Ada Vohl."
    rows = [
        {
            "id": name.encode(),
            "title": b"The_Town",
            "context": context,
            "question": question.encode(),
            "answers": {"text": answers},
        }
        for name, question, answers in (
            ("a", "Who is mayor?", [b"Ada Vohl", b"Ada Vohl"]),
            ("b", "Which river?", [b"the Ost"]),
            ("c", "Why?", [b" "]),
        )
    ]
    with tfds.testing.mock_data(as_data_source_fn=lambda *_, **__: rows):
        corpus = load_tfds("tfds:squad")
    assert [document.title for document in corpus.documents] == ["The Town"] and len(
        corpus.passages
    ) > 1
    text = {passage.id: passage.text for passage in corpus.passages}
    asked = {question.id: question for question in corpus.questions}
    assert set(asked) == {"a", "b"}  # the third has no answer
    assert asked["a"].answers == ("Ada Vohl",)
    for question in asked.values():
        assert question.passages and all(
            question.answers[0] in text[passage] for passage in question.passages
        )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "tfds:squad",
            "tfds:squad is not prepared in {folder}; on a machine with a network run: python scripts/build_dataset.py --dataset=",
        ),
        ("tfds:skwad", "unknown dataset 'skwad'. Did you mean 'squad'?"),
        (
            "tfds:biographies/9x9",
            "has 4x4_documents4_questions2_seed0; run: python scripts/build_dataset.py --dataset=biographies",
        ),
        ("tfds:biographies@train", "is a whole corpus, which has no split to choose"),
        ("tfds:squad/v9", "v9"),
    ],
)
def test_what_is_not_there_is_told(at_hand, data_dir, source, told):
    with pytest.raises(UserError) as error:
        load_tfds(source)
    assert told.format(folder=data_dir) in str(error.value)


@pytest.fixture
def own_copy(data_dir, tmp_path, monkeypatch):
    """The folder of the biographies, to be damaged."""
    (folder,) = Path(shutil.copytree(data_dir / "biographies", tmp_path / "biographies")).glob(
        "*/*/"
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return folder


@pytest.mark.parametrize(
    "name",
    ["biographies-questions.array_record-00000-of-00001", "dataset_info.json", "features.json"],
)
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5])
def test_cut_file_of_a_dataset_is_told(own_copy, name, kept):
    whole = (own_copy / name).read_bytes()
    (own_copy / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(
        UserError,
        match=r"tfds:biographies: .* is not whole \(.*\); delete that folder and prepare it anew",
    ):
        load_tfds("tfds:biographies")


def test_what_a_kill_left_behind_is_not_read(own_copy):
    expected = load_tfds("tfds:biographies")
    shutil.copytree(own_copy, own_copy.with_name("incomplete.ABCDEF_1.0.0"))
    assert load_tfds("tfds:biographies") == expected


def test_missing_shard_and_flipped_bits_are_told(own_copy):
    shard = own_copy / "biographies-questions.array_record-00000-of-00001"
    expected, whole, rng = (
        load_tfds("tfds:biographies"),
        shard.read_bytes(),
        np.random.default_rng(0),
    )
    shard.unlink()
    with pytest.raises(UserError, match="is not whole"):
        load_tfds("tfds:biographies")
    told = 0
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest is padding between blocks
    for at in rng.choice(used, 20, replace=False):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(broken)
        try:
            assert load_tfds("tfds:biographies") == expected
        except UserError as error:
            assert "is not whole" in str(error)
            told += 1
    assert told > 10


def build(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "build_dataset.py"), *arguments]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


@pytest.mark.multiprocess
def test_script_prepares_and_needs_no_tensorflow(tmp_path):
    # Whoever imports TensorFlow gets this one, installed or not.
    (tmp_path / "path" / "tensorflow").mkdir(parents=True)
    (tmp_path / "path" / "tensorflow" / "__init__.py").write_text(
        "raise SystemExit('TensorFlow was imported')"
    )
    code = "import sys; from kafjax.corpus import load; c = load(sys.argv[1], n_retention=0, n_held_out=0); "
    code += "assert 'tensorflow' not in sys.modules; print(len(c.documents))"
    environ = {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}", "TFDS_DATA_DIR": str(tmp_path)}
    done = build("--dataset=biographies", "--subjects=2", **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tfds:biographies/2x3_documents5_questions1_seed0"
    read = subprocess.run(
        [sys.executable, "-c", code, done.stdout.strip()],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert read.stdout.strip() == "10", read.stderr


@pytest.mark.multiprocess
def test_script_says_what_the_srd_lacks(tmp_path):
    for flags, told in (
        ([], "say where the SRD's database is: --source=FILE"),
        (["--source=nowhere"], "nowhere' is not there"),
    ):
        done = build("--dataset=srd", f"--data_dir={tmp_path / 'data'}", *flags)
        assert done.returncode == 2 and told in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_without_a_network_the_script_says_so_at_once(tmp_path):
    with socket.socket() as silent:  # a proxy that takes no connection
        silent.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        done = build(
            "--dataset=squad", f"--data_dir={tmp_path}", http_proxy=proxy, https_proxy=proxy
        )
    assert done.returncode == 2 and time.monotonic() - began < 30
    assert (
        "error: squad is downloaded from rajpurkar.github.io, which does not answer" in done.stderr
    )
    assert not list(Path(tmp_path).iterdir())
