"""Forecasts of trainings, and what `--budget` picks."""

from __future__ import annotations

import jax
import pytest

from experiments import configs, planning
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.parallel import make_mesh
from kafjax.training.forecast import Forecast, matmul_rate, read_seconds, show_seconds

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
    config = changed(configs.Compare(), **values, budget=budget)
    assert planning.within(config, budget, HOUR, label="test") == changed(
        config, **chosen, budget=None
    )


def test_a_start_that_is_repeated_picks_the_same():
    config = configs.Compare()
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


def test_fake_devices_of_a_host_do_not_add_up():
    rate = matmul_rate(jax.numpy.float32, make_mesh())
    assert 1e8 < rate < 1e16
    assert read_seconds("1.5h") == 5400
