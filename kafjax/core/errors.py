"""Errors a user can fix, told in one line, with exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

from absl import app


class UserError(Exception):
    """Something the user can fix. The message is one line that names the thing and the fix."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest known name, else the list of what there is."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs an absl main; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument '{argv[1]}' (flags are written --name=value)")
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again to resume", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    # absl exits with 1 on an unknown or malformed flag; bad input is exit code 2 everywhere here.
    from absl import flags

    try:
        return app.parse_flags_with_usage(argv)
    except SystemExit as error:
        if error.code == 1 and not (flags.FLAGS.is_parsed() and getattr(flags.FLAGS, "help", False)):
            sys.exit(2)
        raise
