"""Every reader of a file, whoever wrote it: what it reads, or one line that names the file; never
another exception, never a hang."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tiny
from safetensors import safe_open

from experiments import comparison
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.sweep_lora import SweepLora
from experiments.sweep_lanes import TrainedLane
from kafjax import hub, lora
from kafjax.core.config_record import read_record, record
from kafjax.core.errors import LONGEST, UserError
from kafjax.core.records import Passage, Prediction
from kafjax.core.rundir import Run, find_run, read_object, write_json
from kafjax.core.schema import read, read_rows
from kafjax.corpus import load_folder, stream_folder
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.results import Arm
from kafjax.hub.safetensors_in import read_tensors
from kafjax.methods import lab, trained
from kafjax.retrieval.exact import ExactIndex
from kafjax.retrieval.store import Store
from kafjax.training import Example
from kafjax.training.packed import PackedRows, write_rows
from kafjax.training.took import Took

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one place is missing, is something else, or stands twice."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {k: v for k, v in value.items() if k != key}
        return (
            rest if not draw(st.integers(0, 4)) else {**rest, key: draw(changed_value(value[key]))}
        )
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed_value(value[at])), *value[at + draw(st.integers(0, 1)) :]]
    return draw(JSON)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file's bytes with some replaced, inserted or cut off."""
    at = draw(st.integers(0, len(data)))
    return (
        data[:at]
        + draw(st.binary(max_size=8))
        + data[at + draw(st.integers(0, 8)) : draw(st.integers(at, len(data) + 1))]
    )


def try_all(
    path: Path, reader: Callable[[], Any], request: pytest.FixtureRequest, *, rows: bool = False
) -> None:
    """Changes the file in as many ways as `--fuzz` says, and asserts that each is read or refused
    in one line of bounded length."""
    good = path.read_bytes()
    reader()
    parsed = [json.loads(line) for line in good.splitlines()] if rows else json.loads(good)

    def written(value: Any) -> bytes:
        return (
            b"\n".join(json.dumps(row).encode() for row in value)
            if rows and isinstance(value, list)
            else json.dumps(value).encode()
        )

    @hypothesis.given(changed_value(parsed).map(written) | changed_bytes(good))
    @hypothesis.settings(
        max_examples=request.config.getoption("--fuzz"),
        derandomize=True,
        deadline=None,
        database=None,
    )
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            reader()
        except UserError as error:
            # A line about the file, or about what it does not fit to: another file of the folder.
            assert len(str(error)) < LONGEST and str(path.parent) in str(error), str(error)

    try:
        check()
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("experiment", [Compare, Finetune, SweepLora], ids=lambda e: e.__name__)
def test_config_json_of_a_run(experiment, tmp_path, request):
    config = experiment()
    path = tmp_path / "mine" / "config.json"
    write_json(path, record(config))

    def reader() -> None:
        read_record(experiment, read_object(path), path)
        find_run(tmp_path, "mine", config, prefix="x")

    try_all(path, reader, request)


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return Prediction(
        "q",
        "rag",
        "seen",
        "Where?",
        "here",
        ("here",),
        ("p",),
        ("p",),
        3,
        1,
        2,
        1,
        True,
        {"f1": 1.0},
        {"decode": 0.1},
    )


@pytest.mark.parametrize("file", ["arm.json", "predictions.jsonl", "prompts.json"])
def test_a_finished_arm(file, prediction, tmp_path, request):
    run = Run(tmp_path)
    cost = Cost(train_flops_measured=1e9, latency_seconds={"total": {"p50": 0.1}})
    prediction = dataclasses.replace(prediction, prompts=("Question: a\nAnswer:", "b"))
    arm = Arm([prediction], cost, [1.5, 2.0], [3, 4], [prediction], "note", {"python": "3.11"})
    comparison.save_arm(run, "rag", arm)
    loaded = comparison.load_arm(run, "rag")
    assert loaded == arm and loaded.predictions[0].prompts == prediction.prompts
    try_all(
        tmp_path / "arms" / "rag" / file,
        lambda: comparison.load_arm(run, "rag"),
        request,
        rows=file.endswith("l"),
    )


NUMBERS = {
    "steps": 3,
    "tokens": 40,
    "targets": 30,
    "seconds": 1.5,
    "compile_seconds": 1,
    "tokens_per_second": 26.7,
    "final_loss": 2.5,
}
NUMBERS |= {
    "trainable_parameters": 9,
    "optimizer_bytes": 72,
    "flops_measured": 1e9,
    "flops_useful": 1e9,
    "peak_memory_bytes": 10**9,
}
NUMBERS |= {
    "train_flops_formula": 1e9,
    "artifact_bytes": 36,
    "flops": 1e9,
    "engine": "exact",
    "ending": "finished",
}
NUMBERS |= {
    "argument_bytes": 99,
    "temporary_bytes": 7,
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 1e-3,
    "targets": "q_proj",
    "seed": 1,
}
NUMBERS |= {"lanes": 2, "checks": [{"step": 1, "loss": 2.0}], "environment": {"git_sha": "0123"}}
SIGNED = ("final_loss", "alpha", "learning_rate", "seed")


@pytest.mark.parametrize(
    "kind", [trained._Learned, Took, lab.IndexRecord, TrainedLane], ids=lambda kind: kind.__name__
)
def test_what_work_took(kind, tmp_path, request):
    path = tmp_path / "record.json"
    own = {"targets": 30} if issubclass(kind, Took) else {}
    write_json(
        path, {field.name: {**NUMBERS, **own}[field.name] for field in dataclasses.fields(kind)}
    )

    def reader() -> None:
        for field, value in dataclasses.asdict(read(kind, path)).items():
            assert (
                value is None
                or isinstance(value, str | list | dict)
                or field in SIGNED
                or 0 <= value < float("inf")
            )

    try_all(path, reader, request)


def test_rows_json(tmp_path, request):
    pytest.importorskip("array_record", reason="array_record is not installed (extra [data])")
    write_rows(
        tmp_path / "rows",
        [Example(np.arange(9, dtype=np.int32), np.ones(9, np.float32))],
        16,
        tokenizer=7,
    )

    def reader() -> None:
        rows = PackedRows.open(tmp_path / "rows")
        assert (
            rows.about.rows == 1
            and len(rows.batches(batch_rows=1, epochs=1)) == 1
            and rows.questions() == []
        )

    try_all(tmp_path / "rows" / "rows.json", reader, request)


@pytest.mark.parametrize("file", ["manifest.json", "passages.jsonl", "ids.json"])
def test_a_saved_store(file, tmp_path, request, monkeypatch):
    # Sums of files are checked before what is in them: they are left out here, so that a changed
    # file is read at all.
    monkeypatch.setattr("kafjax.retrieval.folder._check_file", lambda *_: None)
    index = ExactIndex()
    index.build(["a", "b"], np.eye(2, dtype=np.float32))
    Store(index, [Passage("a", "one"), Passage("b", "two")], "encoder").save(tmp_path / "store")
    (path,) = (tmp_path / "store").rglob(file)
    # The sum and the place of each line, too: a changed text is parsed.
    monkeypatch.setattr("kafjax.retrieval.folder._check_size", lambda *_: None)
    if file == "passages.jsonl":
        monkeypatch.setattr(
            "kafjax.retrieval.texts._File.line",
            lambda self, row: (path.read_bytes().split(b"\n") + [b""] * 2)[row],
        )
        monkeypatch.setattr(
            "kafjax.retrieval.texts._File.__init__",
            lambda self, path, count: vars(self).update(path=path, count=count),
        )
    try_all(path, lambda: Store.load(tmp_path / "store").passages, request, rows=file.endswith("l"))


def test_the_spec_in_an_adapter(tmp_path, request):
    params = {"layers": {"q_proj": {"kernel": np.zeros((2, 4, 6), np.float32)}}}
    spec = lora.Spec(rank=2, targets="q_proj")
    adapters = lora.init(spec, params, jax.random.key(0))
    path, text = tmp_path / "adapter.safetensors", tmp_path / "spec.json"
    lora.save(path, adapters, spec)
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    text.write_text(header["__metadata__"]["spec"])

    def reader() -> None:
        changed_header = {
            **header,
            "__metadata__": {**header["__metadata__"], "spec": text.read_bytes().decode("latin-1")},
        }
        encoded = json.dumps(changed_header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + n :])
        lora.load(path, params)

    try_all(text, reader, request)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    folder = tiny.write_gemma(tmp_path_factory.mktemp("model") / "gemma")
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = list(file.keys())
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")},
    )
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2], "do_sample": True})
    return folder


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"],
)
def test_a_model_folder(file, gemma, tmp_path, request):
    folder = shutil.copytree(gemma, tmp_path / "gemma")
    readers = {
        "config.json": lambda: hub.describe(str(folder)),
        "generation_config.json": lambda: hub.describe(str(folder)),
        "tokenizer.json": lambda: hub.tokenizer(str(folder)),
        "model.safetensors.index.json": lambda: list(read_tensors(folder)),
    }
    try_all(folder / file, readers[file], request)


@pytest.mark.parametrize("file", ["corpus.jsonl", "questions.jsonl"])
def test_a_corpus(file, tmp_path, request):
    folder = tiny.write_corpus(tmp_path / "corpus")

    def reader() -> None:
        corpus = load_folder(folder)
        documents, questions = stream_folder(folder)
        assert [d.text for d in documents] == [d.text for d in corpus.documents] and len(
            questions
        ) >= len(corpus.questions)

    try_all(folder / file, reader, request, rows=True)


def test_predictions_are_told_by_row(prediction, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        "".join(json.dumps({**prediction.to_json(), "calls": calls}) + "\n" for calls in (1, "1"))
    )
    with pytest.raises(
        UserError,
        match=r"predictions\.jsonl: row 2: calls: input should be a valid integer, not '1'; delete it",
    ):
        read_rows(Prediction, path, fix="delete it")
