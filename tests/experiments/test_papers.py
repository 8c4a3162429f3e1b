"""Papers: a card runs as a sweep, is judged again from its raw results, and a sabotage that turns
nothing is told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.configs.paper import Paper
from experiments.configs.sweep_lora import SweepLora
from experiments.papers import (
    capacity,
    depth,
    forget,
    lora,
    ovadia,
    recall,
    regret,
    reproduce,
    scratch,
    unknown,
)
from experiments.papers.card import Sabotage
from kafjax import hub
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.evaluation import raw
from kafjax.evaluation.arms import Arm, Trial
from kafjax.evaluation.claims import CONTRADICTED, NOT_SHOWN, SHOWN, Verdict, between, judge
from kafjax.evaluation.intervals import Interval
from launch.spec import Sweep, product
from tests import tiny

PAGES = Path(__file__).parents[2] / "docs" / "papers"
CARDS = tuple(
    paper.CARD for paper in (capacity, depth, forget, lora, ovadia, recall, regret, unknown)
)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_says_all_that_is_asked_of_it(card):
    assert set(card.design) == {"tiny", "gpu", "full"}
    assert card.expected and card.published.rows and card.sabotages
    texts = [claim.text for claim in card.claims]
    assert len(set(texts)) == len(texts) >= 3
    for sabotage in card.sabotages.values():
        assert set(sabotage.turns) <= set(texts) and sabotage.turns


@pytest.mark.parametrize("scale", ("tiny", "gpu", "full"))
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_has_runs_at_every_scale_which_a_sabotage_changes(card, scale):
    runs = [run.record for run in card.sweep(scale).runs()]
    for sabotage in card.sabotages.values():
        broken = [run.record for run in sabotage.change(card.sweep(scale)).runs()]
        assert broken and broken != runs


def test_bits_are_those_of_a_guess_less_those_of_the_answers():
    n, epochs = 100, 4
    # two targets a fact: the value, and the end, which is always known
    steps = [{"loss": loss, "targets": 2 * n / 5} for loss in np.linspace(2.0, 0.2, 5 * epochs)]
    nats = np.mean([row["loss"] for row in steps[-5:]]) * 2
    expected = n * (math.log2(capacity.POOL) - nats / math.log(2))
    assert capacity.bits(steps, n, epochs) == pytest.approx(expected)
    known = [{**row, "loss": 0.0} for row in steps]
    assert capacity.bits(known, n, epochs) == pytest.approx(n * math.log2(capacity.POOL))


def test_the_best_rate_is_the_vertex_between_rates():
    rates = [10**exponent for exponent in (-4, -3.5, -3, -2.5, -2)]
    by_rate = {rate: (math.log10(rate) + 3.1) ** 2 for rate in rates}
    assert math.log10(regret.best_rate(by_rate)) == pytest.approx(-3.1)
    falling = {rate: -math.log10(rate) for rate in rates}
    assert regret.best_rate(falling) == rates[-1]


def curves(leave: dict[int, int]) -> list[Arm]:
    """Full fine-tuning, whose loss falls, and ranks that follow it until a step."""
    steps = np.arange(100)
    full = np.exp(-steps / 50)
    found = []
    for rank, step in {0: 99, **leave}.items():
        curve = np.maximum(full, full[step])
        settings = {"method": "lora" if rank else "full", "rank": rank}
        settings |= {"targets": regret.ALL, "batch": regret.SMALL, "lr": 1e-2}
        trials = {
            seed: Trial(settings, seed, (), float(curve[-1]), "", Path(), curve=curve)
            for seed in range(3)
        }
        found.append(Arm(settings, trials))
    return found


def test_a_rank_leaves_fulls_curve_where_its_loss_stays_above():
    arms = curves({1: 20, 4: 60})
    one, four = (regret.leaving_step(arms, rank, 0) for rank in (1, 4))
    assert 15 <= one <= 40 < four <= 75
    later, earlier = judge(
        [
            between("4 after 1", regret.leaving_ratio(4, 1), 1.0),
            between("1 after 4", regret.leaving_ratio(1, 4), 1.0),
        ],
        arms,
    )
    assert (later.how, earlier.how) == (SHOWN, CONTRADICTED)


def test_answers_dealt_anew_keep_their_number():
    rows = scratch.facts(50, seed=0)
    dealt = scratch.shuffled(rows)
    assert [row["question"] for row in dealt] == [row["question"] for row in rows]
    assert dealt != rows
    assert sorted(row["golden_answers"][0] for row in dealt) == sorted(
        row["golden_answers"][0] for row in rows
    )


def test_an_unknown_sabotage_is_named_with_the_nearest():
    with pytest.raises(UserError, match="wrong_rate"):
        reproduce.sabotage_of(lora.CARD, "wrong_rates")


def test_a_sabotage_that_turns_nothing_is_told():
    claim = between("it holds", lambda _: Interval(1.0, 0.9, 1.1, 3), 0.0)
    broken = Sabotage("nothing is broken", lambda sweep: sweep, ("it holds",))
    reproduce.check_turned(broken, [Verdict(claim, Interval(1.0, 0.9, 1.1, 3), None, NOT_SHOWN)])
    with pytest.raises(UserError, match="still shown: it holds"):
        reproduce.check_turned(broken, [Verdict(claim, Interval(1.0, 0.9, 1.1, 3), None, SHOWN)])


COMMITTED = [card for card in CARDS if (PAGES / card.name / reproduce.RAW).exists()]


@pytest.mark.parametrize("card", COMMITTED, ids=lambda card: card.name)
def test_committed_answers_are_judged_as_their_page_says(card):
    verdicts = judge(card.claims, raw.read(PAGES / card.name / reproduce.RAW))
    page = (PAGES / card.name / "README.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    told = {row[1].strip(): row[-2].strip() for row in rows}
    assert {v.claim.text: v.how for v in verdicts}.items() <= told.items()


@pytest.mark.slow
def test_a_base_is_made_once_and_opens_as_a_model(tmp_path):
    rows = scratch.facts(40, seed=1)
    corpus = scratch.write_facts(tmp_path / "facts", rows)
    texts = [f"Question: {row['question']}\nAnswer: {row['golden_answers'][0]}\n" for row in rows]
    shape = scratch.Shape(32, 1, 400)
    folder = scratch.base(tmp_path / "base", shape, corpus, texts, epochs=1)
    model, _ = hub.load_decoder(str(folder))
    assert (model.config.hidden_size, model.config.n_layers) == (32, 1)
    before = (folder / "model.safetensors").stat()
    scratch.base(folder, shape, corpus, texts, epochs=1)
    assert (folder / "model.safetensors").stat() == before


def _with_room_for(rank: int, folder: Path) -> Path:
    """A tiny model whose kernels take adapters of a rank."""
    return tiny.write_gemma(
        folder, hidden_size=rank, head_dim=rank // 2, num_key_value_heads=2, vocab_size=900
    )


@pytest.mark.slow
def test_a_card_runs_as_a_sweep_and_is_judged_again_from_its_raw_results(tmp_path, capsys):
    base = changed(
        SweepLora(),
        model=str(_with_room_for(64, tmp_path / "model")),
        ranks=lora.RANKS,
        targets=(lora.QV, lora.Q),
        lrs=(1e-3, 1e-2),
        seeds=(0,),
        subjects=12,
        attributes=1,
        documents=1,
        retention=0,
        held_out=0,
        steps=1,
        max_new_tokens=2,
    )
    card = dataclasses.replace(
        lora.CARD, sweep=lambda scale: Sweep(base, product(corpus=["queries"]))
    )
    first = reproduce.run(card, Paper(folder=str(tmp_path / "runs"), out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "figure.png").stat().st_size > 1000
    page = (tmp_path / "out" / "README.md").read_text()
    assert all(claim.text in page for claim in card.claims) and str(tmp_path) not in page
    again = reproduce.run(
        card, Paper(raw=str(tmp_path / "out" / "raw.jsonl.gz"), out=str(tmp_path / "again"))
    )
    assert [(v.how, v.interval) for v in first] == [(v.how, v.interval) for v in again]
