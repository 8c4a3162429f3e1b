"""Checkpoints: sharded, atomic, the last two kept. A kill or a full disk during a save leaves the one before it."""

from __future__ import annotations

import logging
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kafjax.core.errors import UserError
from kafjax.training.step import TrainState

_STATE, _NOTES = "state", "notes"


class Checkpoints:
    """Checkpoints of one training in `folder`, numbered by step.

    Beside the state each holds `history`, a JSON dict of what a resumed training must know that is not an array, and checksums
    of its arrays.

    Args:
      folder: made if it does not exist.
      fingerprint: of all that the training depends on. A checkpoint with another one is refused.
      keep: how many.
    """

    def __init__(self, folder: Path, fingerprint: str, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports a save in a dozen lines, and damage that is reported below
        self.folder = folder.resolve()
        self._fingerprint, self._keep = fingerprint, keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
        try:
            return ocp.CheckpointManager(self.folder, options=options, item_names=(_STATE, _NOTES))
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, state: TrainState, history: dict[str, Any]) -> None:
        """Writes beside its place and renames when whole. Raises `UserError` if the disk does not take it."""
        leaves = _leaves(state)
        notes = {"fingerprint": self._fingerprint, "history": history, "checksums": _checksums(leaves)}
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(leaves), _NOTES: ocp.args.JsonSave(notes)})
        try:
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # a full disk reaches us as ValueError, OSError or kinds of tensorstore's and orbax's own
            kept = [str(other) for other in self.steps() if other != step]
            which = f"the one of step {kept[-1]} is still good" if kept else "there is none before it"
            raise UserError(f"cannot save the checkpoint of step {step} to {self.folder} ({_first_line(error)}); {which}") from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as `(state, history)`, or None if there is none.

        A damaged one is told in a line, moved aside and passed over.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` leaves with shardings: where the arrays are to lie now, which need not be
            where they lay when saved.

        Raises:
          UserError: the checkpoint has another fingerprint.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(step, abstract)
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                aside = self._set_aside(step)
                text = f"the checkpoint of step {step} is damaged ({_first_line(error)}); moved to {aside}"
                print(text, file=sys.stderr, flush=True)
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        notes = self._manager.restore(step, args=ocp.args.Composite(**{_NOTES: ocp.args.JsonRestore()}))[_NOTES]
        if notes["fingerprint"] != self._fingerprint:
            raise UserError(
                f"{self.folder} holds checkpoints of a training with another model, settings or data; "
                "pick another run name, or delete that folder"
            )
        wanted = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(_leaves(abstract))})
        leaves = self._manager.restore(step, args=wanted)[_STATE]
        for name, checksum in _checksums(leaves).items():
            if checksum != notes["checksums"].get(name, checksum):
                raise ValueError(f"the checksum of {name} does not match")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in _leaves(abstract)]), notes["history"]

    def _set_aside(self, step: int) -> Path:
        self._manager.close()
        aside = self.folder.with_name(f"{self.folder.name}-damaged") / f"{step}-{time.time_ns()}"
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / str(step)).rename(aside)
        self._manager = self._open()
        return aside


def _leaves(state: TrainState) -> dict[str, Any]:
    # A flat dict, so that orbax knows nothing of the classes a state is made of; its names are part of file names.
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {f"{i:05d}{jax.tree_util.keystr(path).replace('/', '.')}": leaf for i, (path, leaf) in enumerate(flat)}


def _checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Of the arrays that this process can see whole. The storage format notices a cut file, but not a flipped bit."""
    whole = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items() if leaf.is_fully_addressable}
    return {name: zlib.crc32(array.reshape(-1).view(np.uint8)) for name, array in whole.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
