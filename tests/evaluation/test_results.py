from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from kafjax.core.records import Prediction
from kafjax.evaluation import comparison_tables
from kafjax.evaluation import results as module
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.figures import draw_all
from kafjax.evaluation.hints import hints
from kafjax.evaluation.results import Arm, as_one_split, collect, headline, splits_of, summarise


def leaves(node, path=()):
    if isinstance(node, dict):
        for key, child in node.items():
            yield from leaves(child, (*path, key))
    else:
        yield path, node


def test_every_quality_value_has_its_interval_and_survives_json(results):
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(results))
    for method in results["methods"].values():
        for value in method["quality"].values():
            assert value.keys() == {"value", "low", "high", "n", "subjects"}
            assert value["low"] <= value["value"] <= value["high"]


def test_headline_keys_are_the_share_of_correct_answers(arms, results):
    for name, arm in arms.items():
        quality = results["methods"][name]["quality"]
        for split in ("seen", "paraphrase", "untrained", "retention"):
            of_split = [p for p in arm.predictions if p.split == split]
            assert quality[split]["value"] == np.mean([p.correct for p in of_split])
            assert quality[f"{split}_f1"]["value"] == pytest.approx(
                np.mean([p.score["f1"] for p in of_split])
            )
            assert quality[split]["n"] == len(of_split)


def test_retrieval_metrics_belong_to_retrieving_arms_and_leave_retention_out(results):
    assert "recall_at_k" not in results["methods"]["lora"]["quality"]
    assert results["methods"]["rag"]["quality"]["recall_at_k"]["n"] == 3 * 96
    assert "retention_recall_at_k" not in results["methods"]["rag"]["quality"]


def test_forgetting_is_measured_from_the_base_model(arms, results):
    quality = {name: method["quality"] for name, method in results["methods"].items()}
    assert "retention_change" not in quality["base"]
    for name in ("full", "rag"):
        expected = quality[name]["retention"]["value"] - quality["base"]["retention"]["value"]
        assert quality[name]["retention_change"]["value"] == pytest.approx(expected)
    assert quality["full"]["retention_change"]["high"] < 0
    assert quality["full"]["perplexity_ratio"]["low"] > 1
    expected = math.exp(sum(arms["full"].held_out_nll) / sum(arms["full"].held_out_tokens))
    assert quality["full"]["perplexity"]["value"] == pytest.approx(expected)


def test_the_order_of_the_questions_does_not_matter(arms):
    shuffled = dataclasses.replace(arms["rag"], predictions=list(arms["rag"].predictions)[::-1])
    straight, reverse = (summarise(arm, arms["base"]) for arm in (arms["rag"], shuffled))
    assert straight["retention_change"] == reverse["retention_change"]
    assert straight["paraphrase"] == reverse["paraphrase"]


def test_arms_that_answered_different_questions_are_not_compared(arms):
    fewer = dataclasses.replace(
        arms["rag"], predictions=[p for p in arms["rag"].predictions if p.id != "paraphrase-5"]
    )
    with pytest.raises(ValueError, match="same questions"):
        collect({"base": arms["base"], "rag": fewer}, config={}, environment={})


def test_break_even_pairs_trained_with_retrieving_arms(results):
    pairs = {(row["trained"], row["retrieval"]): row for row in results["break_even"]}
    assert pairs.keys() == {
        (trained, found) for trained in ("lora", "full") for found in ("rag", "hyde")
    }
    row = pairs["lora", "rag"]
    cost = {name: results["methods"][name]["cost"] for name in ("lora", "rag")}
    spent = {name: one["train_seconds"] + one["index_seconds"] for name, one in cost.items()}
    at_crossing = {
        name: spent[name] + row["queries_seconds"] * cost[name]["latency_seconds"]["total"]["mean"]
        for name in cost
    }
    assert at_crossing["lora"] == pytest.approx(at_crossing["rag"])
    assert pairs["full", "rag"]["queries_rule"] == pytest.approx(1.5 * row["queries_rule"])


def make_arm(right: int, of: int, retrieving: bool, cost: Cost, split: str = "paraphrase") -> Arm:
    passages = ("g",) if retrieving else ()
    rows = [
        Prediction(
            f"{split}{i}",
            "m",
            split,
            "?",
            "",
            ("x",),
            passages=passages,
            gold_passages=("g",),
            correct=i < right,
            subject=f"person {i}",
        )
        for i in range(of)
    ]
    return Arm(rows, cost)


def both_splits(paraphrase: Arm, untrained: Arm) -> Arm:
    return dataclasses.replace(
        paraphrase, predictions=[*paraphrase.predictions, *untrained.predictions]
    )


def test_break_even_between_unequal_arms_is_flagged():
    trained = Cost(train_tokens=1000, trainable_parameters=10, train_seconds=10.0)
    for right, comparable in ((60, False), (95, True)):
        arms = {
            "lora": make_arm(right, 100, False, trained),
            "rag": make_arm(95, 100, True, Cost(index_seconds=1.0)),
        }
        (row,) = collect(arms, config={}, environment={})["break_even"]
        assert row["accuracy"]["paraphrase"]["comparable"] is comparable
        assert row["queries_flops"] is None  # with no cost per query given, nothing is saved
        assert "queries_seconds" not in row  # latency was not measured


def test_an_arm_with_trained_weights_is_not_judged_by_the_base_models_oracle(arms, results):
    assert "distractor harm" in results["error_budget"]["rag"]
    assert "distractor harm" not in results["error_budget"]["lora+rag"]
    own = dataclasses.replace(arms["lora+rag"], oracle=arms["oracle"].predictions)
    budget = collect({"lora+rag": own}, config={}, environment={})["error_budget"]["lora+rag"]
    assert "distractor harm" in budget
    assert sum(share["value"] for share in budget.values()) == pytest.approx(1)


def test_an_arm_that_wins_on_trained_questions_alone_is_not_called_better_on_documents():
    """Training on questions wins on paraphrases of them; on subjects of which only documents were
    trained retrieval wins."""
    trained, index = Cost(train_tokens=1000, trainable_parameters=10), Cost(index_seconds=1.0)
    lora = both_splits(
        make_arm(100, 100, False, trained), make_arm(34, 100, False, trained, "untrained")
    )
    rag = both_splits(make_arm(69, 100, True, index), make_arm(97, 100, True, index, "untrained"))
    collected = collect({"lora": lora, "rag": rag}, config={}, environment={})
    (row,) = collected["break_even"]
    verdicts = {split: accuracy["verdict"] for split, accuracy in row["accuracy"].items()}
    assert list(verdicts.items()) == [("untrained", "less"), ("paraphrase", "greater")]
    shown = [line[4:] for line in comparison_tables.break_even_table(collected).rows]
    assert [(line[0], line[-1]) for line in shown] == [
        ("untrained", "no: retrieval is better"),
        ("paraphrase", "no: trained is better"),
    ]
    assert [t.title for t in comparison_tables.pairwise_tables(collected)] == [
        "Who is better on untrained",
        "Who is better on paraphrase",
    ]
    assert comparison_tables.verdict(collected) == "On untrained, against rag: worse: lora."
    assert "beat subjects of which only documents were trained: lora 66" in "\n".join(
        hints(collected)
    )


def test_the_headline_is_the_split_that_only_documents_taught_where_there_is_one():
    assert (
        module.headline({"seen": 1, "paraphrase": 1, "untrained": 1, "retention": 1}) == "untrained"
    )
    assert module.headline(["retention", "mine", "seen"]) == "seen"
    assert module.headline(["retention"]) is None


def test_comparisons_are_those_with_rag_and_with_base_once_a_split_with_corrected_p_values(
    arms, results
):
    pairs = 2 * (len(arms) - 1) - 1
    assert {row["b"] for row in results["comparisons"]} == {"rag", "base"}
    assert module.contrasts(["lora", "full", "dora"]) == [
        ("lora", "full"),
        ("lora", "dora"),
        ("full", "dora"),
    ]
    by_split = {
        split: [row for row in results["comparisons"] if row["split"] == split]
        for split in ("untrained", "paraphrase", "seen")
    }
    assert {split: len(rows) for split, rows in by_split.items()} == dict.fromkeys(by_split, pairs)
    assert len(results["comparisons"]) == 3 * pairs
    assert all(row["p_holm"] >= row["p_value"] for row in results["comparisons"])


def test_hints_name_what_the_numbers_show(results, partial_results):
    text = "\n".join(hints(results))
    lost = next(line for line in text.splitlines() if "base model knew" in line)
    assert "full 9" in lost
    assert "rag 1" not in lost.replace("lora+rag", "").replace("full+rag", "")
    assert "base already answers" not in text
    assert "hyde" in next(line for line in text.splitlines() if "retrieval miss" in line)
    assert "lora" not in "\n".join(hints(partial_results))


def test_results_without_some_splits_or_texts_can_be_collected():
    arms = {module.BASE: make_arm(0, 5, False, Cost()), "rag": make_arm(4, 5, True, Cost())}
    collected = collect(arms, config={}, environment={}, pending=["lora"])
    assert collected["methods"]["rag"]["quality"]["paraphrase"]["value"] == 0.8
    assert collected["pending"] == ["lora"]
    assert collected["break_even"] == []


def test_where_nothing_is_trained_all_questions_are_one_split_with_its_name_everywhere(
    arms, tmp_path
):
    untrained = {
        name: dataclasses.replace(arms[name], predictions=arms[name].predictions[::8])
        for name in ("base", "rag")
    }
    results = collect(as_one_split(untrained), config={}, environment={})
    n = sum(p.split != "retention" for p in untrained["rag"].predictions)
    assert splits_of(results) == ["all", "retention"] and headline(splits_of(results)) == "all"
    assert results["methods"]["rag"]["quality"]["all"]["n"] == n
    assert {pair["split"] for pair in results["comparisons"]} == {"all"}
    table = comparison_tables.quality_table(results)
    subjects = len({p.gold_passages for p in untrained["rag"].predictions if p.gold_passages})
    assert table.headers[1] == f"all % (n={n} of {subjects})" and any(
        "All (the headline)" in note for note in table.notes
    )
    drawn = draw_all(results, tmp_path)
    assert {"quality_cost", "forgetting", "error_budget", "latency"} == {
        path.stem for path in drawn.values()
    }
    assert any("on all questions" in caption for caption in drawn)
    few = {
        name: dataclasses.replace(arm, predictions=arm.predictions[:20])
        for name, arm in untrained.items()
    }
    assert any(
        "interval, on all," in hint
        for hint in hints(collect(as_one_split(few), config={}, environment={}))
    )
