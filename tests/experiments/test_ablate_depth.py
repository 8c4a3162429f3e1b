"""The ablation of depth as a function, on tiny models: its replies are those of separate prompts,
and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import ablate_depth, arranged, build
from experiments.configs.ablate_depth import AblateDepth
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.records import Passage, Prediction
from kafjax.core.rundir import Run
from kafjax.corpus import open_corpus
from kafjax.corpus.distractors import DISTRACTORS
from kafjax.methods import open_method

TINY = {"engine": "exact", "max_new_tokens": 4, "latency_queries": 1, "batch": 16, "places": 2}
DEPTHS = (0, 1, 2, 5)


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    models = {"model": str(world.gemma), "embedder": str(world.bert), "corpus": str(world.corpus)}
    return changed(
        AblateDepth(),
        **models,
        **TINY,
        depths=DEPTHS,
        name="depth",
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def results(config):
    return ablate_depth.run(config)


def test_a_row_a_depth_with_quality_cost_and_comparisons(config, results):
    rows = {row["k"]: row for row in results["depths"]}
    assert list(rows) == list(DEPTHS)
    assert (
        rows[0]["recall_at_k"] is None
        and rows[5]["recall_at_k"]["value"] >= rows[1]["recall_at_k"]["value"]
    )
    tokens = [row["prompt_tokens"]["value"] for row in rows.values()]
    assert tokens == sorted(tokens) and tokens[0] < tokens[1]
    assert (
        "embed" not in rows[0]["latency_seconds"]
        and {"embed", "search", "prefill"} <= rows[1]["latency_seconds"].keys()
    )
    assert (
        "against_1" not in rows[1]
        and {"difference", "p_value", "verdict"} == rows[5]["against_1"].keys()
    )
    folder = Path(config.run.runs) / "depth"
    assert {"config.json", "predictions.jsonl", "results.json", "table.md", "depth.png"} <= {
        p.name for p in folder.iterdir()
    }
    text = (folder / "table.md").read_text()
    assert "the best first" in text and "times fewer" in text
    predictions = [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()
    ]
    placed = [(kind, place) for kind in DISTRACTORS for place in ("1", "2", "none")]
    expected = {f"k={k}": k for k in DEPTHS} | {": ".join(one): 2 for one in placed}
    assert {p["method"]: len(p["passages"]) for p in predictions} == expected
    assert [(row["distractors"], row["place"]) for row in results["places"]] == placed
    assert (folder / "places.png").stat().st_size > 5_000
    for p in predictions:
        kind, _, place = p["method"].partition(": ")
        if place:
            gold = [i for i, id in enumerate(p["passages"], 1) if id in p["gold_passages"]]
            assert gold == ([] if place == "none" else [int(place)])
        others = [id for id in p["passages"] if id.endswith("/contradicting")]
        assert len(others) == (kind == "contradicting")


def test_replies_are_those_of_separate_runs(config, results):
    assert results["alone"] == {"asked": len(DEPTHS), "identical": len(DEPTHS)}
    corpus, run = open_corpus(config.corpus, 0), Run(Path(config.run.runs) / "depth")
    lab = build.open_lab(
        config.model, config.settings, config.mesh, run, corpus, None, trains=False
    )
    rag = open_method(lab, "rag")
    rag.learn()
    questions = lab.corpus.questions
    by_id = {passage.id: passage for passage in lab.corpus.passages}
    found = rag.find(questions, 6)
    deep = [arranged.at_depths(hits, DEPTHS) for hits in found.hits]
    placed = [
        arranged.at_places(
            by_id[q.passages[0]], [h.passage for h in hits if h.passage.id not in q.passages], 3
        )
        for q, hits in zip(questions, found.hits, strict=True)
    ]
    for of_all in (deep, placed):
        shared = arranged.answer_shared(rag, questions, found, of_all)
        for question, of_question, predictions in zip(questions, of_all, shared, strict=True):
            prompts = [
                arranged.write_prompt(lab, question, passages)[0]
                for passages in of_question.values()
            ]
            replies = rag.generate(arranged.prefix_of(lab), prompts, 4)
            assert [(p.answer, p.prompt_tokens) for p in predictions] == [
                (r.text.strip(), r.prompt_tokens) for r in replies
            ]


def test_the_passage_with_the_answer_is_put_at_each_place_and_left_out():
    gold, *others = (Passage(id, id) for id in "gabcd")
    put = arranged.at_places(gold, others, 3)
    assert {name: "".join(p.id for p in passages) for name, passages in put.items()} == {
        **{"1": "gab", "2": "agb", "3": "abg"},
        "none": "abc",
    }
    assert (
        arranged.at_places(None, others, 3)
        == arranged.at_places(gold, others, 0)
        == arranged.at_places(gold, others, 5)
        == {}
    )


def test_more_seeds_add_to_a_run_and_are_put_into_one_table(config, results):
    more = ablate_depth.run(changed(config, seeds=(0, 1)))
    assert more["seeds"] == [0, 1] and results["seeds"] == [0]
    n = [one["depths"][0]["n_questions"] for one in (results, more)]
    assert n[1] == 2 * n[0]
    # a folder of documents asks every seed the same: their subjects are the same, too
    assert more["depths"][0]["accuracy"]["n"] == results["depths"][0]["accuracy"]["n"]
    folder = Path(config.run.runs) / "depth"
    assert list((folder / "seed-1" / "answers").iterdir()) and not (folder / "seed-0").exists()


def test_a_reader_among_distractors_is_trained_first_and_asked_about_others(config, world):
    trained = changed(
        config,
        **{"method": "raft+rag", "name": "raft", "depths": (0, 1), "places": 0},
        **{"epochs": 1, "rank": 4, "seq_len": 128, "batch_rows": 4, "raft_abstains": True},
    )
    found = ablate_depth.run(trained)
    assert [row["k"] for row in found["depths"]] == [0, 1] and found["places"] == []
    assert "5 passages, in 80% with the one that answers, else 'unknown'" in found["notes"][1]
    asked = open_corpus(config.corpus, 0)
    trained_on = {q.passages for q in asked.training_questions}
    rows = (Path(config.run.runs) / "raft" / "predictions.jsonl").read_text().splitlines()
    assert rows and not {tuple(json.loads(row)["gold_passages"]) for row in rows} & trained_on


def test_a_broken_run_goes_on_where_it_stopped(config, results):
    folder = Path(config.run.runs) / "depth"
    answers = sorted((folder / "answers").iterdir())
    stamps = [p.stat().st_mtime_ns for p in answers]
    (folder / "results.json").unlink()
    assert ablate_depth.run(config)["depths"] == results["depths"]
    assert [p.stat().st_mtime_ns for p in answers] == stamps


def test_the_tokens_of_a_prefill_by_hand():
    def prediction(k: int, n: int, cached: int) -> Prediction:
        return Prediction(
            id="q",
            method=f"k={k}",
            split="",
            question="",
            answer="",
            answers=(),
            prompt_tokens=n,
            cached_tokens=cached,
        )

    # 100 tokens of worked examples, passages of 20, a question of 10; the deepest prompt is the
    # trunk and runs its last token again.
    rows = [[prediction(0, 110, 100), prediction(1, 130, 120), prediction(3, 170, 169)]]
    expected = {
        "alone": 410,
        "behind_examples": 100 + 10 + 30 + 70,
        "shared": 100 + 70 + 10 + 10 + 1,
    }
    assert ablate_depth.prefill_tokens(rows, 100) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "--depths needs a depth"),
        ({"depths": (0,)}, "--depths needs a depth"),
        ({"method": "oracle"}, "--method=oracle searches for nothing"),
        ({"method": "lora"}, "--method=lora searches for nothing"),
        ({"method": "rga"}, "unknown method 'rga'"),
        ({"reranker": "/nowhere"}, "no model '/nowhere'"),
    ],
)
def test_bad_settings_leave_no_folder(config, changes, message):
    with pytest.raises(UserError, match=message):
        ablate_depth.run(changed(config, name="refused", **changes))
    assert not (Path(config.run.runs) / "refused").exists()
