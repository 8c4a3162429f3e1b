"""A comparison from end to end: what it leaves behind, and that it goes on where it was cut off."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.numpy

from kafjax import hub
from kafjax.core.rundir import read_json, read_jsonl
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.prompts import read_prompts
from kafjax.hub.text import prompt_ids
from kafjax.methods import METHODS
from tests import compiling, tiny
from tests.experiments.commands import ROOT, SETTINGS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(finished, world):
    return world.runs / "all"


@pytest.fixture(scope="module")
def results(run):
    return read_json(run / "results.json")


def test_results_have_every_method_with_its_quality_and_its_bill(results):
    assert list(results["methods"]) == list(METHODS)
    assert results["pending"] == []
    for name, method in results["methods"].items():
        assert method["cost"].keys() == {field.name for field in dataclasses.fields(Cost)}
        assert {"seen", "paraphrase", "untrained", "perplexity"} <= method["quality"].keys()
        for key, value in method["quality"].items():
            assert value.keys() == {"value", "low", "high", "n", "subjects"}, (name, key)
            assert value["low"] <= value["value"] <= value["high"] and value["n"] > 0, (name, key)


def test_prompts_are_kept_word_for_word(run, world):
    tokenizer = hub.tokenizer(str(world.gemma))
    for method in METHODS:
        rows = read_jsonl(run / "arms" / method / "predictions.jsonl")
        prompts = read_prompts(run / "arms" / method / "prompts.json")
        assert prompts.keys() == {row["id"] for row in rows} and "prompts" not in rows[0]
        for row in rows:
            asked = prompts[row["id"]]
            assert len(asked) == row["calls"] and all(row["question"] in text for text in asked)
            assert sum(len(prompt_ids(tokenizer, text)) for text in asked) == row["prompt_tokens"]
    assert '"prompts":[[' in (run / "report.html").read_text()


def test_only_what_is_paid_for_is_on_the_bill(results):
    cost = {name: method["cost"] for name, method in results["methods"].items()}
    trained = {name for name in cost if cost[name]["train_seconds"] > 0}
    indexed = {name for name in cost if cost[name]["index_seconds"] > 0}
    assert trained == {"lora", "full", "lora+rag", "full+rag"}
    assert indexed == {"rag", "hyde", "lora+rag", "full+rag"}
    assert (
        cost["base"]["artifact_bytes"]
        == 0
        < cost["lora"]["artifact_bytes"]
        < cost["full"]["artifact_bytes"]
    )
    assert (
        cost["lora+rag"]["artifact_bytes"]
        == cost["lora"]["artifact_bytes"] + cost["rag"]["artifact_bytes"]
    )
    assert {name for name in cost if cost[name]["llm_calls_per_query"] == 2} == {"hyde"}


def test_training_leaves_nothing_but_what_must_be_kept(run):
    kept = {path.name for kind in ("lora", "full") for path in (run / "artifacts" / kind).iterdir()}
    assert kept == {"learned.json", "adapter.safetensors", "weights.safetensors"}


def test_two_devices_compare_as_one(run, world, environment, tmp_path):
    arguments = [*world.flags(runs=tmp_path), *SETTINGS, "--name=two", "--methods=rag,lora,full"]
    command = [sys.executable, "-m", "experiments.compare", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=compiling.environment(devices=2),
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model: mesh fsdp:2: weights, gradients" in done.stderr, done.stderr
    folders = tmp_path / "two", run
    for kind in ("lora", "full"):
        mine, alone = (
            [row["loss"] for row in read_jsonl(f / "metrics.jsonl") if row["method"] == kind]
            for f in folders
        )
        assert len(mine) == len(alone)
        assert mine[:5] == pytest.approx(alone[:5], rel=1e-4) and mine[-1] == pytest.approx(
            alone[-1], rel=0.2
        )
    mine, alone = (
        [row["answer"] for row in read_jsonl(f / "predictions.jsonl") if row["method"] == "rag"]
        for f in folders
    )
    assert mine == alone


def test_a_hybrid_trains_nothing(run):
    rows = read_jsonl(run / "metrics.jsonl")
    steps = collections.defaultdict(list)
    for row in rows:
        steps[row["method"]].append(row["step"])
    assert steps.keys() == {"lora", "full"}
    assert all(of_method == list(range(1, len(of_method) + 1)) for of_method in steps.values())


def test_every_question_has_a_prediction_of_every_method(run, world):
    asked = {q["id"]: q for q in tiny.questions() if q["split"] not in ("train", "replay")}
    texts = {row["id"] for row in tiny.documents()}
    predictions = read_jsonl(run / "predictions.jsonl")
    assert {p["method"] for p in predictions} == set(METHODS)
    for name in METHODS:
        of_method = {p["id"]: p for p in predictions if p["method"] == name}
        with_gold = {id for id, q in asked.items() if q.get("passages")}
        assert of_method.keys() == (with_gold if name == "oracle" else asked.keys())
        for id, p in of_method.items():
            assert (p["question"], p["answers"], p["split"]) == (
                asked[id]["question"],
                asked[id]["golden_answers"],
                asked[id]["split"],
            )
            assert isinstance(p["correct"], bool)
            assert {passage.partition("#")[0] for passage in p["passages"]} <= texts
    assert len(predictions) == len({(p["method"], p["id"]) for p in predictions})


def test_the_table_has_every_row_and_what_was_measured(run, finished):
    table = (run / "table.md").read_text()
    for name in METHODS:
        # quality, learning, asking, error budget
        assert len(re.findall(rf"^\| {re.escape(name)} ", table, re.MULTILINE)) >= 4, name
    assert "| lora+rag" in finished.out


def test_the_report_needs_no_other_file_and_no_network(run):
    report = (run / "report.html").read_text()
    assert all(f">{name}<" in report for name in METHODS)
    sources = re.findall(r"""src\s*=\s*['"]([^'"]*)|url\(([^)]*)\)""", report)
    assert len(sources) >= 4 and all(
        source[0].startswith("data:image/png;base64,") for source in sources
    )
    # What is linked is the page itself, and the answers as a file within it.
    links = re.findall(r"""href\s*=\s*['"]([^'"]*)""", report)
    (answers,) = (link for link in links if not link.startswith("#"))
    assert answers.startswith("data:text/csv;base64,")
    assert all(f"id='{link[1:]}'" in report for link in links if link != answers)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", report, re.DOTALL)
    assert [about.strip() for about, _ in scripts] == ["type='application/json' id='answers'", ""]
    assert not re.search(r"fetch|XMLHttp|import|WebSocket|//|\burl\b", scripts[1][1])
    assert report.count("<script") == 2 and "@import" not in report


def test_what_is_finished_is_not_run_again(compare, world, run, results):
    stamps = {
        path: path.stat().st_mtime_ns
        for folder in ("arms", "artifacts")
        for path in (run / folder).rglob("*")
    }
    metrics = (run / "metrics.jsonl").read_bytes()
    outcome = compare(*world.flags(), *SETTINGS, "--name=all")
    assert outcome.code == 0, outcome.err
    assert re.findall(r"^(\S+): finished earlier$", outcome.err, re.MULTILINE) == list(METHODS)
    assert {
        path: path.stat().st_mtime_ns
        for folder in ("arms", "artifacts")
        for path in (run / folder).rglob("*")
    } == stamps
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert read_json(run / "results.json") == results


def test_arms_say_by_what_they_were_computed_and_others_are_named(
    compare, world, run, results, tmp_path
):
    environments = [method["environment"] for method in results["methods"].values()]
    assert all(
        one == environments[0] and one["git_sha"] and len(one["weights"]) == 12
        for one in environments
    )
    shutil.copytree(run, tmp_path / "all")
    left = tmp_path / "all" / "artifacts" / "lora" / "checkpoints" / "10"
    left.mkdir(parents=True)  # by a kill between the result and the clearing
    arm = tmp_path / "all" / "arms" / "rag" / "arm.json"
    arm.write_text(
        json.dumps(
            read_json(arm)
            | {"environment": environments[0] | {"git_sha": "0123abc", "weights": "other"}}
        )
    )
    outcome = compare(*world.flags(runs=tmp_path), *SETTINGS, "--name=all")
    assert outcome.code == 0, outcome.err
    table = " ".join((tmp_path / "all" / "table.md").read_text().split())
    assert "rag: computed by an earlier start with commit 0123abc, weights other" in table
    assert not left.parent.exists()


def test_a_run_killed_and_then_interrupted_in_training_ends_like_one_left_alone(
    world, environment, run, results
):
    """Three starts of one command: `kill -9` during LoRA, Ctrl-C during full fine-tuning, and one
    to the end."""
    command = [
        sys.executable,
        "-m",
        "experiments.compare",
        *world.flags(),
        *SETTINGS,
        "--name=broken",
        "--methods=base,lora,full",
    ]
    broken = world.runs / "broken"

    def start():
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop_in(kind: str, process: subprocess.Popen, how: signal.Signals) -> str:
        metrics, wanted = broken / "metrics.jsonl", f'"method": "{kind}"'
        # written beside the training, under another name until whole
        saved = broken / "artifacts" / kind / "checkpoints"
        while not (
            metrics.exists()
            and metrics.read_text().count(wanted) > 12
            and any(path.name.isdigit() for path in saved.glob("*"))
        ):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.005)
        process.send_signal(how)
        output, _ = process.communicate(timeout=120)
        assert not (broken / "artifacts" / kind / "learned.json").exists(), (
            "it was stopped too late to show anything"
        )
        return output

    killed = start()
    stop_in("lora", killed, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    interrupted = start()
    output = stop_in("full", interrupted, signal.SIGINT)
    assert interrupted.returncode == 130, output
    assert re.search(r"lora: resuming after step \d+ of \d+", output)
    assert "run the same command again to resume" in output and "Traceback" not in output
    last = start()
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert (
        re.search(r"full: resuming after step \d+ of \d+", output)
        and "lora: finished earlier" in output
    )

    for name in ("base", "lora", "full"):
        assert (
            read_json(broken / "results.json")["methods"][name]["quality"]
            == results["methods"][name]["quality"]
        )
    for file in ("lora/adapter.safetensors", "full/weights.safetensors"):
        mine, alone = (
            safetensors.numpy.load_file(folder / "artifacts" / file) for folder in (broken, run)
        )
        assert mine.keys() == alone.keys() and all(
            (mine[path] == alone[path]).all() for path in mine
        )
    losses = collections.defaultdict(set)
    for row in read_jsonl(broken / "metrics.jsonl"):
        losses[row["method"], row["step"]].add(row["loss"])
    alone = {
        (row["method"], row["step"]): {row["loss"]} for row in read_jsonl(run / "metrics.jsonl")
    }
    assert losses == alone  # a step that was done twice had the same loss both times


def test_first_rows_stand_before_the_last_arm_is_done(compare, world):
    """An arm that fails leaves the table of those before it."""
    outcome = compare(
        *world.flags(), *SETTINGS, "--name=diverges", "--methods=base,rag,full", "--lr_full=1e30"
    )
    assert outcome.code == 2 and "lower the learning rate" in outcome.err
    results = read_json(world.runs / "diverges" / "results.json")
    assert (list(results["methods"]), results["pending"]) == (["base", "rag"], ["full"])
    assert "Still to come: full" in (world.runs / "diverges" / "report.html").read_text()


def test_more_passages_asked_for_than_there_are(compare, world):
    outcome = compare(
        *world.flags(), *SETTINGS, "--name=clamped", "--methods=lora+rag", "--epochs=1", "--k=50"
    )
    assert outcome.code == 0, outcome.err
    assert "k=50 is more than the 6 passages" in outcome.err
    predictions = read_jsonl(world.runs / "clamped" / "predictions.jsonl")
    assert all(len(set(p["passages"])) == 6 for p in predictions)


def test_a_prompt_longer_than_the_context_loses_its_worst_passages(compare, world, run, tmp_path):
    whole = {p["id"]: p for p in read_jsonl(run / "predictions.jsonl") if p["method"] == "rag"}
    needed = {id: p["prompt_tokens"] + 4 for id, p in whole.items()}  # with the longest answer
    context = max(needed.values()) - 1
    too_long = {id for id in needed if needed[id] > context}
    cramped = tiny.write_gemma(tmp_path / "cramped", max_position_embeddings=context)
    outcome = compare(*world.flags(model=cramped), *SETTINGS, "--name=cramped", "--methods=rag")
    assert outcome.code == 0, outcome.err
    assert (
        f"rag: {len(too_long)} of 14 prompts did not fit the model's context of {context} tokens"
        in outcome.err
    )
    for p in read_jsonl(world.runs / "cramped" / "predictions.jsonl"):
        assert p["passages"] == whole[p["id"]]["passages"][: 1 if p["id"] in too_long else 2]
        assert p["prompt_tokens"] + 4 <= context


def test_questions_of_which_only_some_have_a_gold_passage(compare, world, tmp_path):
    questions = [
        {**q, "passages": q.get("passages", []) if i % 2 else []}
        for i, q in enumerate(tiny.questions())
    ]
    corpus = tiny.write_corpus(tmp_path / "some", questions=questions)
    outcome = compare(
        *world.flags(corpus=corpus), *SETTINGS, "--name=some", "--methods=base,oracle"
    )
    assert outcome.code == 0, outcome.err
    asked = {
        p["id"]
        for p in read_jsonl(world.runs / "some" / "predictions.jsonl")
        if p["method"] == "oracle"
    }
    assert asked == {
        q["id"]
        for q in questions
        if q["passages"] and q["split"] not in ("train", "replay", "retention")
    }


def test_changed_documents_do_not_meet_old_results(compare, world, tmp_path):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    command = [*world.flags(corpus=corpus), *SETTINGS, "--name=changing", "--methods=base"]
    assert compare(*command).code == 0
    rows = tiny.documents()
    rows[0]["contents"] = rows[0]["contents"].replace("Veltmora", "Ostrand")
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = compare(*command)
    assert (
        outcome.code == 2 and "corpus_hash" in outcome.err and "pick another --name" in outcome.err
    )


def test_own_questions_without_a_split_are_all_one_where_nothing_is_trained(
    compare, world, tmp_path
):
    rows = [row for row in tiny.questions() if row["split"] in ("untrained", "train")]
    asked = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    corpus = tiny.write_corpus(tmp_path / "own", questions=asked)
    flags = [
        *world.flags(corpus=corpus, runs=tmp_path / "runs"),
        *SETTINGS,
        "--epochs=1",
        "--retention=0",
        "--held_out=0",
        "--name=own",
    ]
    outcome = compare(*flags, "--methods=base,rag")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs" / "own"
    quality = read_json(run / "results.json")["methods"]["rag"]["quality"]
    assert (
        quality["all"]["n"] == len(asked) and "untrained" not in quality and "seen" not in quality
    )
    subjects = quality["all"]["subjects"]  # by gold passages, as the file names none
    assert subjects < len(asked) and f"all % (n={len(asked)} of {subjects})" in outcome.out
    assert (run / "figures" / "quality_cost.png").exists() and (
        run / "figures" / "error_budget.png"
    ).exists()
    assert {row["split"] for row in read_jsonl(run / "predictions.jsonl")} == {"all"}
    with_training = compare(*flags, "--methods=base,lora")  # the same run: base is not asked again
    assert with_training.code == 0 and "base: finished earlier" in with_training.err, (
        with_training.err
    )
    assert {"seen", "untrained"} <= read_json(run / "results.json")["methods"]["lora"][
        "quality"
    ].keys()
