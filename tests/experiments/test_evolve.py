"""Knowledge that changes, followed by tiny models from end to end: killed and resumed, with more
ways and seeds added, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import evolve as experiment
from experiments.configs.evolve import Evolve
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.records import Prediction, Question
from kafjax.core.rundir import read_json, read_jsonl
from kafjax.corpus.stream import Asked
from kafjax.evaluation.evolve import STALE, WEIGHED
from tests.experiments.commands import refused
from tests.kills import KILLED

TINY = {
    **{"subjects": 4, "attributes": 2, "documents": 2, "questions_per_fact": 1, "n_steps": 2},
    **{"added": 1, "edited": 1, "deleted": 1, "epochs": 2, "step_epochs": 2, "rank": 4},
    **{"batch_rows": 4, "seq_len": 64, "lr_lora": 1e-2, "k": 2, "engine": "exact"},
    **{"max_new_tokens": 4, "latency_queries": 1},
}
WAYS = ("base", "lora-on", "rag", "lora-on+rag")


def flags(world, runs: Path, *more: str) -> list[str]:
    values = {"model": world.gemma, "embedder": world.bert, "runs": runs, "name": "run", **TINY}
    values["steps"] = values.pop("n_steps")
    return [*(f"--{name}={value}" for name, value in values.items()), *more]


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    settings = {name: value for name, value in TINY.items() if name != "n_steps"}
    return changed(
        Evolve(),
        **settings,
        steps=TINY["n_steps"],
        model=str(world.gemma),
        embedder=str(world.bert),
        ways=WAYS,
        name="run",
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def alone(config):
    """The results of a run that nobody disturbs, and its answers before others add to it."""
    return experiment.run(config), answers(Path(config.run.runs) / "run")


@pytest.fixture(scope="module")
def results(alone):
    return alone[0]


def answers(folder: Path) -> list[tuple]:
    rows = read_jsonl(folder / "predictions.jsonl")
    return sorted((r["method"], r["seed"], r["step"], r["id"], r["answer"]) for r in rows)


def test_every_way_has_a_row_for_each_step_and_every_measure(config, results):
    assert list(results["ways"]) == list(WAYS)
    for name, found in results["ways"].items():
        assert [row["step"] for row in found["steps"]] == [0, 1, 2]
        last = found["steps"][-1]
        for key in ("new", "old", "stale", "told", "weighed"):
            assert 0 <= last[key]["value"] <= 1
        assert last["new"]["n"] == 2 and found["steps"][0]["new"] is None
        seconds = [row["update"]["seconds"]["value"] for row in found["steps"]]
        assert (min(seconds) > 0) == (name != "base")
    folder = Path(config.run.runs) / "run"
    assert {"evolve.png", "table.md", "predictions.jsonl", "results.json", "config.json"} <= {
        path.name for path in folder.iterdir()
    }
    both, lora, rag = (results["ways"][name]["steps"][1]["update"] for name in WAYS[:0:-1])
    for key in ("tokens", "flops", "bytes_written"):
        added = lora[key]["value"] + rag[key]["value"]
        assert both[key]["value"] == pytest.approx(added, rel=0.2 if key == "bytes_written" else 0)
    # weights that no step needs any more are gone
    assert not list(folder.glob("artifacts/seed-0/weights/*/*"))


def test_the_base_answers_alike_after_every_step(alone):
    results, told = alone
    by_step: dict[str, set[str]] = {}
    for method, _, _, id, answer in told:
        if method == "base":
            by_step.setdefault(id, set()).add(answer)
    assert all(len(told) == 1 for told in by_step.values())
    assert results["ways"]["base"]["overall"]["forgotten"]["value"] == 0.0


def test_more_ways_and_seeds_add_to_a_run_and_leave_what_is_there(config, results):
    folder = Path(config.run.runs) / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("seed-0/*/*.json*")}
    more = experiment.run(changed(config, ways=("base", "rag"), seeds=(0, 1)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert more["ways"]["rag"]["overall"]["update"]["seconds"]["n"] == 4
    assert (
        more["ways"]["rag"]["overall"]["new"]["n"] > results["ways"]["rag"]["overall"]["new"]["n"]
    )
    assert list(folder.glob("seed-1/rag/2.json")) and not list(folder.glob("seed-1/lora-on"))


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_like_one_left_alone(alone, evolve, world, tmp_path):
    results, told = alone
    own = flags(world, tmp_path, "--ways=lora-on+rag")
    folder, reached = tmp_path / "run", []
    for n in (40, 70):
        outcome = evolve(*own, kill=(folder, n))
        assert outcome.code == KILLED, outcome.err
        reached.append(len(list(folder.glob("seed-0/*/*.json"))))
    assert reached == sorted(reached) and reached[-1] < 3
    outcome = evolve(*own)
    assert outcome.code == 0, outcome.err
    assert "Next: more seeds" in outcome.out and "--seeds=0,1,2" in outcome.out
    assert answers(folder) == [row for row in told if row[0] == "lora-on+rag"]
    again = read_json(folder / "results.json")["ways"]["lora-on+rag"]
    for mine, theirs in zip(again["steps"], results["ways"]["lora-on+rag"]["steps"], strict=True):
        for key in ("tokens", "flops"):
            assert mine["update"][key] == theirs["update"][key]
        assert mine["weighed"] == theirs["weighed"] and mine["new"] == theirs["new"]


def asked(past: tuple[str, ...] = (), split: str = "new") -> Asked:
    return Asked(Question("s/a", "?", ("Lyon",), split), past)


@pytest.mark.parametrize(
    ("reply", "correct", "stale"),
    [
        ("Porto", False, 1.0),
        ("Lyon", True, 0.0),
        ("Lyon or Porto", True, 0.0),
        ("x\nPorto", False, 0.0),
    ],
)
def test_a_stale_answer_tells_an_old_value_and_not_the_new_one(reply, correct, stale):
    p = Prediction("s/a", "w", "new", "?", reply, ("Lyon",), correct=correct, score={"f1": 0.5})
    assert experiment.judge(p, asked(("Porto",)), None).score == {"f1": 0.5, STALE: stale}
    assert experiment.judge(p, asked(), None).score == {"f1": 0.5}
    deleted = experiment.judge(p, asked(("Lyon",), "deleted"), 0.25)
    assert deleted.score == {"f1": 0.5, WEIGHED: 0.25}


class Weighing:
    """A method whose log-likelihoods are given."""

    def weigh(self, questions, replies):
        assert replies == [("Lyon", "Porto", "Leeds", "Turin", "Ghent")]
        return [[-3.0, -9.0, -3.0, -1.0, -4.0]]


def test_a_deleted_value_is_weighed_against_others_of_its_kind():
    one = Asked(
        Question("s/a", "?", ("Lyon",), "deleted"), (), ("Porto", "Leeds", "Turin", "Ghent")
    )
    # above two, beside one, below one
    assert experiment.weigh(Weighing(), [one]) == {"s/a": 2.5 / 4}
    assert experiment.weigh(Weighing(), []) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ()}, "--ways and --seeds need one each"),
        ({"ways": ("lora-of",)}, "unknown way 'lora-of'"),
        ({"corpus": "squad"}, "--corpus=squad does not change"),
        ({"corpus": "factbook"}, "give the older one, --old=DIR"),
        ({"corpus": "factbook", "old": "/nowhere"}, "no such folder"),
        ({"edited": 5}, "step 1 finds 4 facts to edit, not 5"),
        ({"reranker": "/nowhere"}, "no model '/nowhere'"),
        ({"ways": ("pissa-on",)}, "cannot go on from an adapter"),
    ],
)
def test_bad_settings_leave_no_folder(config, changes, message):
    with pytest.raises(UserError, match=message):
        experiment.run(changed(config, name="refused", **changes))
    assert not (Path(config.run.runs) / "refused").exists()


def test_a_profile_is_refused_or_helped_in_one_line(evolve, world, tmp_path):
    outcome = evolve(*flags(world, tmp_path, "--profile=smok"))
    assert "unknown profile 'smok'. Did you mean 'smoke'" in refused(outcome)
    shown = evolve("--help").out
    assert "--step_epochs" in shown and "--seeds" in shown and "--replay" not in shown
