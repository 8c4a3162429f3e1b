from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kafjax.core import progress
from kafjax.core.progress import Progress, say, waiting

fcntl = pytest.importorskip("fcntl", reason="no pseudo-terminals on this system")
termios = pytest.importorskip("termios", reason="no pseudo-terminals on this system")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing came for 30 s"
        time.sleep(0.01)


class Log(io.StringIO):
    """A standard error that is no terminal: `with contextlib.redirect_stderr(Log()) as log`."""

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


class Terminal:
    """A pseudo-terminal as standard error, and what a person sees on it."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.stderr = os.fdopen(slave, "w")
        self._written = ""
        os.set_blocking(self._master, False)

    def read(self) -> str:
        """All that was written so far."""
        try:
            while chunk := os.read(self._master, 65536):
                self._written += chunk.decode()
        except OSError:  # nothing there
            pass
        return self._written

    def screen(self) -> list[str]:
        """The lines after all carriage returns; the last one is where the cursor stands."""
        lines = []
        for raw in self.read().replace("\r\n", "\n").split("\n"):
            line = ""
            for part in raw.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines

    def close(self) -> None:
        self.stderr.close()
        os.close(self._master)


# Not fixtures: pytest puts its own stream in place between the set-up of a test and the test.
@contextlib.contextmanager
def on_a_terminal(columns: int = 80) -> Iterator[Terminal]:
    with (
        contextlib.closing(Terminal(columns)) as terminal,
        contextlib.redirect_stderr(terminal.stderr),
    ):
        yield terminal


def test_lines_keep_coming_while_nothing_advances(monkeypatch):
    with contextlib.redirect_stderr(Log()) as log:
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
        began = time.monotonic()
        with Progress("train", 100) as bar:
            wait_until(lambda: len(log.lines) >= 3)
            assert all(re.fullmatch(r"train: 0/100, \d+ s", line) for line in log.lines)
            time.sleep(0.1)
            bar.advance(1, "loss 1.25")
            n = len(log.lines)
            wait_until(lambda: len(log.lines) >= n + 3)
            matches = [
                re.fullmatch(r"train: 1/100  loss 1.25, (\d+) s left", line)
                for line in log.lines[n + 1 :]
            ]
            left = [int(match[1]) for match in matches if match is not None]
            # by what is done: the rest does not grow while nothing is
            assert len(left) == len(matches) and left == sorted(left, reverse=True)
        assert len(log.lines) <= (time.monotonic() - began) / 0.05 + 1  # no more often than that


def test_fast_steps_give_few_lines_and_the_last_one_always():
    with contextlib.redirect_stderr(Log()) as log:
        with Progress("train", 1000, done=400) as bar:
            for step in range(400, 1000):
                bar.advance(1, f"step {step + 1}")
        (line,) = log.lines
        assert re.fullmatch(r"train: 1000/1000  step 1000, \d+ s", line)


def test_the_time_left_counts_from_where_a_resumed_run_began(monkeypatch):
    with contextlib.redirect_stderr(Log()) as log:
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
        with Progress("train", 1000, done=900) as bar:
            time.sleep(0.2)
            bar.advance(1)
            wait_until(lambda: "901/" in log.lines[-1])
            # A step took 0.2 s, 99 are left; had the 900 earlier ones counted, it would be 0 s.
            assert int(re.search(r"(\d+) s left", log.lines[-1])[1]) >= 19


def test_waiting_says_what_for_until_it_is_over(monkeypatch):
    with contextlib.redirect_stderr(Log()) as log:
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
        with waiting("train", "compiling"):
            assert log.lines[0] == "train: compiling ..."
            wait_until(lambda: len(log.lines) >= 3)
        n = len(log.lines)
        assert all(re.fullmatch(r"train: compiling, \d+ s \.\.\.", line) for line in log.lines[1:])
        time.sleep(0.2)
        assert len(log.lines) == n


def test_waiting_that_is_soon_over_says_nothing_where_it_may():
    with contextlib.redirect_stderr(Log()) as log:
        with waiting("model", "reading", after=30.0):
            pass
        assert log.lines == []
        with waiting("model", "reading", after=0.05):
            wait_until(lambda: log.lines)
        assert re.fullmatch(r"model: reading, \d+ s \.\.\.", log.lines[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_passes_and_the_lines_end(monkeypatch, error):
    with contextlib.redirect_stderr(Log()) as log:
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
        for block in (lambda: Progress("train", 10), lambda: waiting("train", "compiling")):
            with pytest.raises(error), block():
                wait_until(lambda: len(log.lines) >= 2)
                raise error
            assert log.getvalue().endswith("\n")
            n = len(log.lines)
            time.sleep(0.1)
            assert len(log.lines) == n


def test_a_bar_lives_while_nothing_advances_and_stays_whole(monkeypatch):
    with on_a_terminal() as terminal:
        monkeypatch.setattr(progress, "BAR_SECONDS", 0.05)
        with Progress("train", 4, done=1, unit="row") as bar:
            wait_until(lambda: terminal.read().count("1/4") >= 3)
            bar.advance(1, "loss 1.25")
            wait_until(
                lambda: "2/4" in terminal.screen()[-1] and "loss 1.25" in terminal.screen()[-1]
            )
            say("train", "a checkpoint was saved")
            bar.advance(2, "loss 1.00")
        message, drawn, cursor = terminal.screen()
        assert message == "train: a checkpoint was saved"
        assert re.match(r"train: 100%\|█+\| 4/4 .*row.*loss 1.00", drawn)
        assert cursor == ""


def test_a_terminal_without_a_size_gets_lines(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with on_a_terminal(columns=0) as terminal:
        with Progress("train", 4) as bar:
            wait_until(lambda: terminal.screen()[0] == "train: 0/4, 0 s")
            bar.advance(4)
        assert re.fullmatch(r"train: 4/4, \d+ s", terminal.screen()[-2])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_cursor_on_a_new_line(monkeypatch, error):
    with on_a_terminal() as terminal:
        monkeypatch.setattr(progress, "BAR_SECONDS", 0.01)
        with pytest.raises(error), Progress("train", 4) as bar:
            bar.advance(1)
            raise error
        drawn, cursor = terminal.screen()
        assert drawn.startswith("train:  25%")
        assert cursor == ""
        time.sleep(0.1)
        assert terminal.screen() == [drawn, cursor]


def test_ctrl_c_in_the_middle_of_a_bar():
    """The whole of it: a main under a terminal, interrupted while a step runs."""
    code = """
import time
from kafjax.core.errors import run_main
from kafjax.core.progress import Progress

def main(argv):
    with Progress("train", 4) as bar:
        bar.advance(1, "loss 1.25")
        time.sleep(60)

run_main(main)
"""
    terminal = Terminal(80)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stderr=terminal.stderr
    )
    try:
        wait_until(lambda: "loss 1.25" in terminal.read())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        drawn, *rest = terminal.screen()
    finally:
        process.kill()
        terminal.close()
    assert drawn.startswith("train:  25%")
    assert rest == ["", "interrupted: run the same command again to resume", ""]
