"""Errors a user can fix, told in one line, with exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from absl import app, flags, logging


class UserError(Exception):
    """Something the user can fix. The message is one line that names the thing and the fix."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: `"Did you mean 'x'?"` for the closest known one, else the list of what there is."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs an absl main; a `UserError` or a bad flag becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # JAX tells of every backend that it does not find
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument '{argv[1]}' (flags are written --name=value)")
            main(argv)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again to resume", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    # absl's own parser prints two lines and exits with 1.
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{error} (--help lists the flags)")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
