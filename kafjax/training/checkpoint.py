"""Checkpoints: sharded, atomic, written while training goes on, the last two kept. A kill or a full
disk during a save leaves the one before it.

Each process writes and reads the parts of its devices, so `folder` has to be shared by all of them;
on another mesh or with another number of processes the parts are cut anew.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from kafjax.core import paths
from kafjax.core.errors import SaveFailed, UserError
from kafjax.parallel import distributed
from kafjax.training.checksum import checksums
from kafjax.training.journal import Journal
from kafjax.training.staged import Staged
from kafjax.training.step import TrainState

_STATE, _NOTES, _JOURNAL = "state", "notes", "history.jsonl"


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Drops what orbax logs: a dozen lines about a save, and damage that is reported here."""
    return record.levelno >= logging.CRITICAL or "orbax" not in Path(record.pathname).parts


class Checkpoints:
    """Checkpoints of one training in `folder`, numbered by step. All processes make the same calls.

    Beside the state each holds checksums of its arrays and `history`, a JSON dict of whatever else
    a resumed training must know. Lists in `history` may only grow: all checkpoints share one file
    of them (`journal`), so that a save costs only the new items.

    Args:
      folder: made if it does not exist.
      fingerprint: hash of all that the training depends on. A checkpoint with another one is
        refused.
      keep: number of checkpoints that are kept.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2):
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self.folder = folder if paths.is_address(folder) else folder.resolve()
        try:
            self._staged = Staged(self.folder) if str(self.folder).startswith("s3:") else None
        except OSError as error:
            raise UserError(f"cannot read {self.folder}: {error.strerror or error}") from error
        self._here = self.folder if self._staged is None else self._staged.folder
        self._fingerprint, self._keep = fingerprint, keep
        self._saving: int | None = None  # the step that may still be on its way to the disk
        self._failed = False
        _silence_late_writes()
        self._manager = self._open()
        self._journal = Journal(self.folder / _JOURNAL)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        try:
            return ocp.CheckpointManager(self._here, options=options, item_names=(_STATE, _NOTES))
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror or error}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not self._failed and (error is None or jax.process_count() == 1):
                self.wait()
                self._manager.close()
        except UserError:
            if error is None:
                raise
        finally:
            if self._staged is not None:
                self._staged.close()

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, state: TrainState, history: dict[str, Any]) -> None:
        """Copies the state to the host and returns; the state may then be overwritten. A thread
        writes the copy and renames it when whole. For `s3://` it returns when all is uploaded.

        Raises:
          UserError: the disk does not take this one, or did not take the one before.
        """
        self.wait()
        leaves = _leaves(state)
        notes = {"fingerprint": self._fingerprint, "step": step, "checksums": checksums(leaves)}
        self._saving = step

        def write() -> None:
            # First the journal: a checkpoint that is whole never refers to lines that are not
            # there. Rows of metrics, likewise, are there up to the step that is resumed from.
            paths.flush()
            noted = {**notes, "history": self._journal.append(history)}
            noted = json.loads(json.dumps(noted))  # as it is now: it is written later
            items = ocp.args.Composite(
                **{_STATE: ocp.args.StandardSave(leaves), _NOTES: ocp.args.JsonSave(noted)}
            )
            self._manager.save(step, args=items, force=True)
            if self._staged is not None:
                self._manager.wait_until_finished()
                self._staged.publish()

        self._tell_errors(write)

    def check(self) -> None:
        """Raises `UserError` if the last save has failed already; does not wait for it."""
        self._tell_errors(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises `UserError` if the disk does not take
        it."""
        self._tell_errors(self._manager.wait_until_finished)
        self._saving = None

    def _tell_errors(self, action: Any) -> None:
        try:
            action()
        # a full disk reaches us as ValueError, OSError or kinds of tensorstore's and orbax's own
        except Exception as error:
            step, self._saving = self._saving, None
            kept = [str(other) for other in self.steps() if other != step]
            which = (
                f"the one of step {kept[-1]} is still good" if kept else "there is none before it"
            )
            self._failed = True
            raise SaveFailed(
                f"cannot save the checkpoint of step {step} to {self.folder} ({_first_line(error)}); {which}"
            ) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest intact checkpoint as `(state, history)`; None if there is none.

        One that any process finds damaged is reported in a line, moved aside and skipped by all.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` leaves with the shardings wanted now, which
            may differ from those saved.

        Raises:
          UserError: the checkpoint has another fingerprint.
        """
        self.wait()
        for step in reversed(self.steps()):
            found, problem = None, ""
            try:
                found = self._read(step, abstract)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                problem = _first_line(error)
            if distributed.all_agree(found is not None) and found is not None:
                leaves, notes, history = found
                sums = checksums(leaves)
                wrong = [
                    name for name, checksum in notes["checksums"].items() if sums[name] != checksum
                ]
                if not wrong:
                    values = [leaves[name] for name in _leaves(abstract)]
                    return jax.tree.unflatten(jax.tree.structure(abstract), values), history
                problem = f"the checksum of {wrong[0]} does not match"
            aside = self._set_aside(step)
            if problem and (distributed.is_main() or found is None):
                print(
                    f"the checkpoint of step {step} is damaged ({problem}); moved to {aside}",
                    file=sys.stderr,
                    flush=True,
                )
        # whatever was read of it belongs to no state
        self._journal = Journal(self.folder / _JOURNAL)
        return None

    def _read(
        self, step: int, abstract: TrainState
    ) -> tuple[dict[str, jax.Array], dict[str, Any], dict[str, Any]]:
        # By the handler and not by the manager: if one process cannot read its part, the others
        # shall not wait for it in there.
        folder = self._here / str(step)
        notes = json.loads((folder / _NOTES / "metadata").read_text())
        if notes["fingerprint"] != self._fingerprint:
            raise UserError(
                f"{self.folder} holds checkpoints of a training with another model, settings or data; "
                "pick another run name, or delete that folder"
            )
        if notes["step"] != step:
            raise ValueError(f"it is that of step {notes['step']}")
        history = self._journal.read(notes["history"])
        handler = ocp.StandardCheckpointHandler()
        path: Any = folder / _STATE  # typed as etils' Path; any os.PathLike will do
        return (
            handler.restore(path, args=ocp.args.StandardRestore(_leaves(abstract))),
            notes,
            history,
        )

    def _set_aside(self, step: int) -> Path:
        self._manager.close()
        aside = self.folder.with_name(f"{self.folder.name}-damaged") / f"{step}-{time.time_ns()}"
        if distributed.is_main():
            paths.move(self.folder / str(step), aside)
            if self._staged is not None:
                shutil.rmtree(self._here / str(step))
        distributed.wait_for_all("set aside")
        self._manager = self._open()
        return aside


@functools.cache
def _silence_late_writes() -> None:
    """Silences writes that fail late: after one array of a save fails, each other one would print a
    traceback about a closed event loop."""
    before = sys.unraisablehook  # the writing threads of C++ have nobody to raise to

    def hook(unraisable: Any) -> None:
        if not (
            unraisable.exc_type is RuntimeError
            and str(unraisable.exc_value) == "Event loop is closed"
        ):
            before(unraisable)

    sys.unraisablehook = hook


def _leaves(state: TrainState) -> dict[str, Any]:
    # A flat dict, so that orbax knows nothing of the classes a state is made of; its names are part
    # of file names.
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        f"{i:05d}{jax.tree_util.keystr(path).replace('/', '.')}": leaf
        for i, (path, leaf) in enumerate(flat)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
