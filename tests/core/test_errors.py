"""Errors of a main as a user sees them: one line and an exit code. Each case is a process of its
own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kafjax.core.errors import nearest

ROOT = Path(__file__).parents[2]
MAIN = """
import time
from absl import flags, logging
from kafjax.core.errors import UserError, run_main

METHODS = flags.DEFINE_list("methods", ["base"], "Which methods to run.")
COUNT = flags.DEFINE_integer("count", 1, "How many.")
flags.DEFINE_float("share", 0.5, "A share.", lower_bound=0)

def main(argv):
    if COUNT.value == 0:
        raise UserError("--count=0: nothing to do;\\n  ask for at least one")
    if COUNT.value == 13:
        raise ZeroDivisionError("a mistake in the program")
    if COUNT.value == 7:
        logging.warning("seven is odd")
    if COUNT.value == 99:
        print("ready", flush=True)
        time.sleep(60)
    print("ran", *METHODS.value)

run_main(main)
"""


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*flags: str) -> tuple[int, str, str]:
    process = start(*flags)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_main_that_ends_well():
    assert run("--methods=rag,lora") == (0, "ran rag lora\n", "")


def test_a_warning_is_told_in_words_alone():
    assert run("--count=7") == (0, "ran base\n", "WARNING: seven is odd\n")


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        # a UserError, put on one line
        ("--count=0", ["--count=0: nothing to do; ask for at least one"]),
        ("--metods=rag", ["metods", "Did you mean: methods ?", "--help"]),
        ("--count=few", ["--count=few", "--help"]),
        ("--methods", ["--methods", "--help"]),
        ("rag", ["'rag'", "--name=value"]),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(flag, parts):
    code, out, err = run(flag)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts)


def test_a_mistake_in_the_program_keeps_its_traceback():
    code, _, err = run("--count=13")
    assert code == 1
    assert "ZeroDivisionError: a mistake in the program" in err


def test_help_goes_to_stdout():
    code, out, err = run("--help")
    assert code in (0, 1)  # absl says 1
    assert "Which methods to run." in out
    assert err == ""


def test_ctrl_c_is_130_and_no_traceback():
    process = start("--count=99")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\ninterrupted: run the same command again to resume\n"


def test_nearest_names_the_closest_or_all():
    known = ["rag", "lora", "full", "lora+rag"]
    assert nearest("loar", known) == "Did you mean 'lora'?"
    assert nearest("lora-rag", known) == "Did you mean 'lora+rag'?"
    assert nearest("zzz", known) == "Known: full, lora, lora+rag, rag."
    assert nearest("rga", iter(known)) == "Did you mean 'rag'?"


@pytest.mark.parametrize(
    "flag",
    ["--share=nan", "--share=inf", "--share=-1", f"--count={10**30}", f"--count={'9' * 5000}"],
)
def test_a_number_that_is_none_is_refused_in_one_short_line(flag: str) -> None:
    process = start(flag)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1100


def test_a_terminal_that_only_knows_ascii_is_told_in_escapes():
    for flag, told in (("--methods=Zürich", "ran Z\\xfcrich"), ("--cuont=Zürich", "cuont")):
        command = [sys.executable, "-c", MAIN, flag]
        environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert told in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert done.returncode == (0 if "methods" in flag else 2)
