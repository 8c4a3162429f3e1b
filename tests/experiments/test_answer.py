"""Asking: the same answers as in the comparison whose work is used, one line for what cannot be
answered, and a clean end."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys

import jax
import pytest

from experiments import build
from experiments.configs.answer import Answer
from kafjax.core.config import changed
from kafjax.core.rundir import Run, read_jsonl
from kafjax.corpus import open_corpus
from kafjax.generation import Sampling
from tests import tiny
from tests.experiments.commands import ASKING, ROOT, SETTINGS, refused

pytestmark = pytest.mark.slow

QUESTION = "Where was Mira Toll born?"  # the corpus's own: asked of every method in the comparison
STRANGE = "Who keeps bees?"


@pytest.fixture(scope="module")
def run(finished, world):
    return world.runs / "all"


@pytest.mark.parametrize("method", ["base", "oracle", "rag", "hyde", "lora", "full+rag"])
def test_answers_as_in_the_comparison(answer, run, method):
    outcome = answer(
        f"--run={run}", f"--method={method}", f"--question={QUESTION}", "--max_new_tokens=4"
    )
    assert outcome.code == 0, outcome.err
    predictions = [
        p
        for p in read_jsonl(run / "predictions.jsonl")
        if p["method"] == method and p["question"] == QUESTION
    ]
    shown = {line[:10].strip(): line[10:] for line in outcome.out.splitlines() if line[:10].strip()}
    assert shown["answer"] == predictions[0]["answer"]
    assert shown["known"] == f"Veltmora  ({'right' if predictions[0]['correct'] else 'wrong'})"
    assert re.findall(r"\d\. \[(\S+)\]", outcome.out) == predictions[0]["passages"]
    texts = {f"{row['id']}#0": row["contents"] for row in tiny.documents()}
    assert all(f"[{id}] {texts[id]}" in outcome.out for id in predictions[0]["passages"])
    p = predictions[0]
    calls = ", 2 calls" if method == "hyde" else ""
    assert (
        shown["tokens"]
        == f"{p['prompt_tokens']} prompt ({p['cached_tokens']} cached), {p['output_tokens']} output{calls}"
    )
    stages = set(p["seconds"])
    milliseconds = {
        name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", shown["ms"])
    }
    assert milliseconds.keys() == {*stages, "total"}
    assert sum(milliseconds[stage] for stage in stages) <= milliseconds["total"] + 0.1 * len(stages)


def test_a_question_of_ones_own_has_no_known_answer(answer, run):
    outcome = answer(f"--run={run}", f"--question={STRANGE}", "--k=1")
    assert outcome.code == 0, outcome.err
    # --k may differ from the run's
    assert "known" not in outcome.out and len(re.findall(r"\d\. \[", outcome.out)) == 1


def test_an_index_is_built_once_without_a_run(answer, world, tmp_path):
    command = [
        *world.flags(runs=tmp_path),
        *ASKING,
        f"--question={QUESTION}",
    ]
    first, second, fewer = (
        answer(*command),
        answer(*command),
        answer(*command, "--k=1", "--max_new_tokens=2"),
    )
    assert first.code == second.code == fewer.code == 0, first.err + second.err + fewer.err
    assert first.out.splitlines()[0] == second.out.splitlines()[0]
    (folder,) = tmp_path.iterdir()
    assert list((folder / "artifacts" / "index" / "store").glob("*/passages.jsonl"))
    assert (
        "indexing passages: 6/6" in first.err and "indexing passages" not in second.err + fewer.err
    )


def test_what_has_not_been_trained_names_the_command_that_trains_it(
    answer, compare, world, tmp_path
):
    runs = tmp_path / "runs"
    trained_nothing = compare(
        *world.flags(runs=runs), *SETTINGS, "--name=plain", "--methods=base", "--epochs=1"
    )
    assert trained_nothing.code == 0, trained_nothing.err
    ask = [f"--run={runs / 'plain'}", "--method=lora+rag", f"--question={QUESTION}"]
    line = refused(answer(*ask))
    assert "lora+rag has not been trained in" in line
    command = shlex.split(re.search(r"run: (.*), then ask again", line)[1])
    assert command[:3] == ["python", "-m", "experiments.compare"] and "--methods=lora" in command
    training = compare(*command[3:])
    assert training.code == 0, training.err
    outcome = answer(*ask)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("answer ")


def test_what_finetune_has_trained_can_be_asked(answer, finetune, world, tmp_path):
    settings = ["--method=lora", "--epochs=1", "--rank=4", "--batch_rows=2", "--seq_len=64"]
    trained = finetune(*world.flags(runs=tmp_path, embedder=None), *settings, "--name=tuned")
    assert trained.code == 0, trained.err
    run = [f"--run={tmp_path / 'tuned'}", "--max_new_tokens=40", f"--embedder={world.bert}"]
    alone, with_passages = (
        answer(*run, *method, f"--question={QUESTION}")
        for method in ([], ["--method=lora+rag", "--engine=exact"])
    )
    assert alone.code == with_passages.code == 0, alone.err + with_passages.err
    assert "passages" not in alone.out and "passages" in with_passages.out
    assert "full has not been trained in" in refused(
        answer(*run, "--method=full", f"--question={QUESTION}")
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method=rga"], "unknown method 'rga'. Did you mean 'rag'?"),
        (["--question="], "--question is empty"),
        (["--rank=8"], "flag 'rank' (--help lists the flags)"),  # of training
        (["--seed=8"], "--seed=8 differs from"),
        (
            ["--method=oracle", f"--question={STRANGE}"],
            "oracle needs a question whose answering passage the corpus names, such as '",
        ),
    ],
)
def test_bad_flags(answer, run, flags, expected):
    assert expected in refused(answer(f"--run={run}", *flags))


def test_a_run_that_is_not_there(answer, run):
    assert f"Did you mean '{run}'?" in refused(answer(f"--run={run}l", "--question=Who?"))


def test_asked_in_turn(answer, run):
    lines = f"{QUESTION}\n{STRANGE}\n{QUESTION}\n\nnever asked\n"
    outcome = answer(f"--run={run}", "--method=oracle", stdin=lines)
    assert outcome.code == 0, outcome.err
    answers = re.findall(r"^answer .*", outcome.out, re.MULTILINE)
    assert len(answers) == 2 and answers[0] == answers[1]
    # and it went on
    assert len(re.findall(r"^error: oracle needs a question", outcome.err, re.MULTILINE)) == 1
    # no empty line: the end of the input
    ends = answer(f"--run={run}", "--method=base", stdin=f"{QUESTION}\n")
    assert ends.code == 0 and ends.out.count("answer ") == 1


def test_control_c_ends_it(environment, run):
    command = [sys.executable, "-u", "-m", "experiments.answer", f"--run={run}", "--method=base"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        process.stdin.write(f"{QUESTION}\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("answer ")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors


def test_documents_alone_will_do(answer, world, tmp_path):
    corpus = tiny.write_corpus(tmp_path / "mute", questions=None)
    asked = answer(*world.flags(corpus=corpus, runs=tmp_path), f"--question={STRANGE}")
    assert asked.code == 0, asked.err
    assert "passages" in asked.out and "known" not in asked.out


def test_a_reply_that_its_limit_cuts_says_so(answer, run):
    short = answer(f"--run={run}", "--method=base", f"--question={STRANGE}", "--max_new_tokens=1")
    assert "cut at 1 tokens; --max_new_tokens allows more" in short.out
    # the run itself allowed 4
    longer = answer(f"--run={run}", "--method=base", f"--question={STRANGE}")
    assert (
        "cut at 4 tokens" not in longer.out and int(re.search(r"(\d+) output", longer.out)[1]) > 4
    )


def test_weights_that_only_answer_lie_in_the_type_they_are_computed_with(world, tmp_path):
    config = changed(
        Answer(),
        model=str(world.gemma),
        corpus=str(world.corpus),
        embedder=str(world.bert),
        dtype="bfloat16",
    )
    corpus = open_corpus(config.corpus)
    given = (config.model, config.settings, "auto", Run(tmp_path), corpus, None)
    kept, served = (build.open_lab(*given, trains=trains) for trains in (True, False))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(lab.params)) for lab in (kept, served)]
    assert 0.5 < sizes[1] / sizes[0] < 0.52  # norms stay in float32
    prompts = [question.text for question in corpus.questions]
    mine, expected = (
        [
            reply.text
            for reply in lab.generator.generate(lab.params, prompts, Sampling(max_new_tokens=8))
        ]
        for lab in (served, kept)
    )
    assert mine == expected


def test_an_index_is_all_that_retrieval_needs(answer, build_index, world, tmp_path):
    index = tmp_path / "index"
    made = build_index(
        f"--corpus={world.corpus}", f"--embedder={world.bert}", f"--out={index}", "--engine=exact"
    )
    assert made.code == 0, made.err
    ask = [
        *world.flags(corpus=None, runs=tmp_path / "runs"),
        f"--index={index}",
        f"--question={QUESTION}",
        "--max_new_tokens=4",
        "--k=2",
    ]
    found = answer(*ask)
    assert found.code == 0, found.err
    with_corpus = answer(
        *world.flags(runs=tmp_path),
        "--engine=exact",
        f"--question={QUESTION}",
        "--max_new_tokens=4",
        "--k=2",
    )
    assert (
        re.findall(r"\d\. \[(\S+)\] (.*)", found.out)
        == re.findall(r"\d\. \[(\S+)\] (.*)", with_corpus.out)
        != []
    )
    assert not (tmp_path / "runs").exists()
    assert "indexing" not in found.err
    assert (
        "--method=lora needs more than the passages of --index; it goes with base, rag, hyde, rewrite"
        in refused(answer(*ask, "--method=lora"))
    )
    assert "leave --corpus and its settings out" in refused(
        answer(*ask, f"--corpus={world.corpus}")
    )
    assert "--engine=scann" in refused(answer(*ask, "--engine=scann"))
    assert "nowhere" in refused(answer(*ask, f"--index={tmp_path / 'nowhere'}"))


def test_a_file_that_is_added_is_embedded_alone(answer, world, tmp_path):
    corpus = tmp_path / "notes"
    corpus.mkdir()
    (corpus / "bees.md").write_text("Mira Toll keeps bees.\n")
    (corpus / "boats.md").write_text("Mira Toll builds boats.\n")
    ask = [
        *world.flags(corpus=corpus, runs=tmp_path / "runs"),
        "--engine=exact",
        "--max_new_tokens=2",
    ]
    first = answer(*ask, "--question=Who keeps bees?")
    assert first.code == 0 and "indexing passages: 2/2" in first.err, first.err
    (corpus / "clocks.md").write_text("Otto Varn repairs clocks.\n")
    (corpus / "boats.md").unlink()
    second = answer(*ask, "--question=Who repairs clocks?")
    assert second.code == 0 and "indexing new passages: 1/1" in second.err, second.err
    assert "Otto Varn repairs clocks." in second.out and "boats.md" not in second.out
    assert len(list((tmp_path / "runs").iterdir())) == 1
    third = answer(*ask, "--question=Who repairs clocks?")
    assert third.code == 0 and "indexing" not in third.err


def test_a_comparison_searches_an_index_that_holds_its_passages(
    compare, build_index, world, tmp_path
):
    index = tmp_path / "index"
    made = build_index(
        f"--corpus={world.corpus}", f"--embedder={world.bert}", f"--out={index}", "--engine=exact"
    )
    assert made.code == 0, made.err
    compared = compare(
        *world.flags(runs=tmp_path / "runs"),
        *SETTINGS,
        "--methods=base,rag",
        f"--index={index}",
        "--name=given",
    )
    assert compared.code == 0, compared.err
    assert (
        "indexing" not in compared.err
        and "whose seconds and memory are not on this bill" in compared.out
    )
    grown = [*tiny.documents(), {"id": "new", "contents": "Bees winter in the old mill."}]
    other = tiny.write_corpus(tmp_path / "other", corpus=grown)
    line = refused(
        compare(
            *world.flags(corpus=other, runs=tmp_path / "runs"),
            *SETTINGS,
            "--methods=rag",
            f"--index={index}",
        )
    )
    assert "does not hold the passages of" in line and "1 differ, such as 'new#0'" in line
