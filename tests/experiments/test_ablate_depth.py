"""The ablation of depth as a function, on tiny models: its replies are those of separate prompts,
and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import ablate_depth, build
from experiments.configs import AblateDepth
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.records import Passage, Prediction
from kafjax.core.rundir import Run
from kafjax.corpus import open_corpus
from kafjax.methods import open_method
from kafjax.retrieval import Hit

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
    expected = {**{f"k={k}": k for k in DEPTHS}, "gold at 1": 2, "gold at 2": 2, "no gold": 2}
    assert {p["method"]: len(p["passages"]) for p in predictions} == expected
    assert [row["place"] for row in results["places"]] == ["gold at 1", "gold at 2", "no gold"]
    assert all(
        p["passages"][0] in p["gold_passages"] for p in predictions if p["method"] == "gold at 1"
    )
    assert not any(
        set(p["passages"]) & set(p["gold_passages"])
        for p in predictions
        if p["method"] == "no gold"
    )


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
    deep = [ablate_depth.at_depths(hits, DEPTHS) for hits in found.hits]
    placed = [
        ablate_depth.at_places(hits, [by_id[id] for id in q.passages], 3)
        for q, hits in zip(questions, found.hits, strict=True)
    ]
    for arranged in (deep, placed):
        shared = ablate_depth.answer_shared(rag, questions, found, arranged)
        for question, of_question, predictions in zip(questions, arranged, shared, strict=True):
            prompts = [
                ablate_depth.write_prompt(lab, question, passages)[0]
                for passages in of_question.values()
            ]
            replies = rag.generate(ablate_depth.prefix_of(lab), prompts, 4)
            assert [(p.answer, p.prompt_tokens) for p in predictions] == [
                (r.text.strip(), r.prompt_tokens) for r in replies
            ]


def test_the_passage_with_the_answer_is_put_at_each_place_and_left_out():
    gold, *others = (Passage(id, id) for id in "gabcd")
    hits = [Hit(passage, 0.0) for passage in (others[0], gold, *others[1:])]
    put = ablate_depth.at_places(hits, [gold], 3)
    assert {name: "".join(p.id for p in passages) for name, passages in put.items()} == {
        **{"gold at 1": "gab", "gold at 2": "agb", "gold at 3": "abg"},
        "no gold": "abc",
    }
    assert (
        ablate_depth.at_places(hits, [], 3)
        == ablate_depth.at_places(hits, [gold], 0)
        == ablate_depth.at_places(hits, [gold], 5)
        == {}
    )


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
