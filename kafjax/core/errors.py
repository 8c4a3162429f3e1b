"""Errors a user can fix, told in one line, with exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from logging import Formatter

from absl import app, flags, logging

from kafjax.core.text import visible

LONGEST = 1000
"""Characters of a message; what is longer quotes a file rather than tells of it."""


class UserError(Exception):
    """An error that the user can fix. The message is one line that names the thing and the fix."""


class SaveFailed(UserError):
    """A checkpoint could not be saved. The saving library's threads may wait for ever, so the
    process exits without joining them."""


class SharedError(UserError):
    """An error that all processes raise at the same point, so that none has to be stopped by
    another."""


class Preempted(Exception):
    """SIGTERM came and the state is saved. The message says where to resume."""


def report(error: BaseException) -> int:
    """Prints an error to stderr, in one line if the user can fix it, and returns its exit code."""
    if isinstance(error, UserError):
        print(f"error: {_one_line(str(error))}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, Preempted):
        print(f"stopped by SIGTERM: {error}", file=sys.stderr, flush=True)
        # 128 + 15, as if the signal had ended it: not 0, or SLURM and Kubernetes would take the
        # work for done
        return 143
    if isinstance(error, KeyboardInterrupt):
        print("\ninterrupted: run the same command again to resume", file=sys.stderr, flush=True)
        return 130
    traceback.print_exception(error)
    return 1


def _one_line(message: str) -> str:
    line = visible(" ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


def check_text(text: str, what: str) -> str:
    """Returns `text` if it can be encoded. Raises `UserError` naming `what` if it held bytes that
    are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds bytes that are no UTF-8: {visible(text[:60])}; write it in UTF-8"
        ) from error
    return text


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: `"Did you mean 'x'?"` for the closest
    known one, else the list of all."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def run_main(main: Callable[[list[str]], None], most_arguments: int = 0) -> None:
    """Runs an absl main; a `UserError` or a bad flag becomes one line on stderr and exit code 2,
    Ctrl-C exit code 130, SIGTERM 143.

    Args:
      most_arguments: how many words that are no flags `main` takes.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            # JAX tells of every backend that it does not find
            logging.set_verbosity(logging.WARNING)
        # in words, without the thread and the line of the source
        logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
        try:
            if len(argv) > 1 + most_arguments:
                raise UserError(
                    f"unexpected argument '{argv[1 + most_arguments]}' (flags are written --name=value)"
                )
            main(argv)
        except (UserError, Preempted, KeyboardInterrupt) as error:
            code = report(error)
            if isinstance(error, SaveFailed):
                sys.stdout.flush()
                os._exit(code)
            sys.exit(code)

    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # something has read from it already
            sys.stdin.reconfigure(errors="surrogateescape")  # `check_text` names what is no UTF-8
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that only knows ASCII is told of the rest in escapes
            stream.reconfigure(errors="backslashreplace")
    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    # absl's own parser prints two lines and exits with 1.
    try:
        rest = flags.FLAGS(argv)
        _check_numbers()
        return rest
    except flags.Error as error:
        sys.exit(report(UserError(f"{error} (--help lists the flags)")))
    except UserError as error:
        sys.exit(report(error))


def _check_numbers() -> None:
    # Bounds of absl let NaN through, for it compares as false. No flag needs a whole number above
    # 32 bits.
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value}: must be a finite number")
        if isinstance(value, int) and not abs(value) < 2**31:
            raise UserError(f"--{name}: must be between -2147483647 and 2147483647")
