"""Forecasts of trainings, and what `--budget` picks."""

from __future__ import annotations

import time

import pytest

from experiments import planning
from experiments.configs.compare import Compare
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.models import Decoder
from kafjax.parallel import make_mesh
from kafjax.training import TrainConfig, forecast
from kafjax.training.forecast import Forecast, measure, read_seconds, renewing, show_seconds
from tests.shapes import TINY

HOUR = {
    "lora": Forecast(steps=600, tokens=9, seconds=1200),
    "full": Forecast(steps=600, tokens=9, seconds=2400),
}


@pytest.mark.parametrize(
    ("values", "budget", "chosen"),
    [
        ({}, "2h", {}),
        ({"epochs": 8}, "32m", {"epochs": 4}),
        ({"epochs": 8, "subjects": 16}, "16m", {"subjects": 8, "epochs": 4}),
        ({"epochs": 8, "subjects": 16}, "4m", {"subjects": 4, "epochs": 2}),
        ({"epochs": 8, "subjects": 16}, "30s", {"steps": 4}),
        ({"epochs": 8, "corpus": "folder"}, "16m", {"epochs": 2}),
        ({"epochs": 2, "corpus": "folder"}, "16m", {"steps": 150}),
        ({"steps": 600}, "16m", {"steps": 150}),
    ],
)
def test_a_budget_takes_passes_first_then_subjects_then_steps(values, budget, chosen):
    config = changed(Compare(), **values, budget=budget)
    assert planning.within(config, budget, HOUR, label="test") == changed(
        config, **chosen, budget=None
    )


def test_a_start_that_is_repeated_picks_the_same():
    config = Compare()
    slower = {name: Forecast(f.steps, f.tokens, f.seconds * 1.1) for name, f in HOUR.items()}
    picks = {
        repr(planning.within(config, "20m", expected, label="test")) for expected in (HOUR, slower)
    }
    assert len(picks) == 1


@pytest.mark.parametrize("text", ["", "20", "m", "-1m", "0s", "1e9h", "20 m", "twenty"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="is no time; write 90s, 20m or"):
        read_seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (7.31, "7.3 s"),
        (95, "95 s"),
        (127, "2.1 min"),
        (1500, "25 min"),
        (15_999, "4.4 h"),
    ],
)
def test_times_are_shown_in_two_digits(seconds, text):
    assert show_seconds(seconds) == text


def test_speed_is_measured_at_the_sizes_of_a_model_and_in_a_moment():
    model, config = Decoder(TINY), TrainConfig(batch_rows=2, seq_len=32)
    began = time.perf_counter()
    speed = measure(model, config, make_mesh())
    assert time.perf_counter() - began < 30  # a second on an idle machine
    assert all(1e5 < rate < 1e16 for rate in (speed.kernels, speed.vocabulary, speed.memory))


def test_a_forecast_names_its_spread():
    assert str(Forecast(steps=600, tokens=12_345, seconds=1500)) == (
        "600 steps on 12,345 tokens, about 25 min (between 17 min and 38 min)"
    )
    assert read_seconds("1.5h") == 5400


def test_a_forecast_is_renewed_once_from_the_steps_of_its_own_training(monkeypatch, capsys):
    clock, rows = iter([10.0, 12.0, 18.0, 19.0, 30.0, 31.0]), []
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(clock))
    log = renewing(lambda **row: rows.append(row), HOUR, "method")
    for step in (41, 42, 45, 46):
        log(method="lora", step=step)
    log(method="base+x", step=1)
    assert [row["step"] for row in rows] == [41, 42, 45, 46, 1]
    assert capsys.readouterr().err == (
        "lora: 2 s a step as measured: about 18 min left, 20 min in all (20 min forecast)\n"
    )
