"""Files of tests are ordered and marked by the CPU seconds in the table, and measured into it."""

from __future__ import annotations

import json

import pytest

from tests import seconds

pytest_plugins = ["pytester"]
BURN = "import time\ndef test_one():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
PAIR = "def test_one(): pass\ndef test_two(): pass\n"


@pytest.fixture
def session(pytester, monkeypatch):
    """`session(table, *arguments, write=False)` runs three files; returns `file::test` in the order
    they ran in."""
    monkeypatch.setattr(seconds, "TESTS", pytester.path)
    monkeypatch.setattr(seconds, "TABLE", pytester.path / "seconds.json")
    pytester.makepyfile(test_a=PAIR, test_b=PAIR, test_c=BURN)

    def run(table: dict[str, float], *arguments: str, write: bool = False) -> list[str]:
        seconds.TABLE.write_text(json.dumps(table))
        ran = pytester.inline_run(*arguments, plugins=[seconds.Seconds(write)])
        assert ran.ret == 0
        return [
            f"{call.item.path.stem}::{call.item.name}"
            for call in ran.getcalls("pytest_runtest_setup")
        ]

    return run


def test_the_longest_file_starts_first_and_keeps_its_order(session):
    order = session({"test_b.py": 3.0, "test_c.py": 2.0})
    assert order == [
        "test_b::test_one",
        "test_b::test_two",
        "test_c::test_one",
        "test_a::test_one",
        "test_a::test_two",
    ]


def test_all_tests_of_a_long_file_are_slow(session):
    table = {"test_b.py": seconds.LONG, "test_c.py": seconds.LONG - 0.1}
    assert {name.split("::")[0] for name in session(table, "-m", "slow")} == {"test_b"}
    assert {name.split("::")[0] for name in session(table, "-m", "not slow")} == {
        "test_a",
        "test_c",
    }


def test_what_ran_is_measured_and_the_rest_of_the_table_kept(session):
    table = {"test_a.py": 5.0, "test_b.py": 0.1, "test_gone.py": 9.0}
    session(table, "test_b.py", "test_c.py", write=True)
    written = json.loads(seconds.TABLE.read_text())
    assert written["test_a.py"] == 5.0 and "test_gone.py" not in written
    assert 0.3 <= written["test_c.py"] < 5 and written["test_b.py"] < written["test_c.py"]
    assert list(written) == sorted(written, key=lambda name: -written[name])


def test_nothing_is_written_unless_asked_for(session):
    session({"test_b.py": 0.1}, "test_c.py")
    assert json.loads(seconds.TABLE.read_text()) == {"test_b.py": 0.1}
