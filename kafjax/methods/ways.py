"""Ways to keep a model up to date with knowledge that changes, by the names of `WEIGHTS` and
`READERS`: what trains at a step, and beside what.

    full           all weights, trained from the base on all that holds now
    lora-newest    a new adapter a step, trained from the base on what the step brought; the newest answers
    lora-on        one adapter that goes on training on what each step brought
    rag            nothing trains: passages are upserted and deleted in one index
    lora-on+rag    both

    lab.folder/weights/lora-on/0, 1, ...      what each step has trained; ways of the same weights share it
    lab.folder/index/rag                      the index, brought up to each step
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from kafjax import hub, lora
from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Corpus
from kafjax.core.schema import Amount, Count
from kafjax.corpus.stream import Snapshot
from kafjax.lora.files import ADAPTER
from kafjax.methods import BASE, READERS, READING, WEIGHTS, parts
from kafjax.methods.lab import Lab
from kafjax.methods.lora import LoRA
from kafjax.methods.method import Method
from kafjax.retrieval.kinds import LEXICAL, changes

AGAIN, NEWEST, ON = "again", "newest", "on"
WAYS = (BASE, "full", "lora-newest", "lora-on", "rag", "lora-on+rag")
"""Ways of an experiment that is not asked for others."""
_NOTES = {
    AGAIN: "trained from the base at each step, on all that holds then",
    NEWEST: "trained from the base on what the step brought alone; the newest answers",
    ON: "going on from the step before, on what the step brought alone",
}


@dataclasses.dataclass(frozen=True)
class Way:
    """Weights, how they follow the changes (None: they never train), and a reader or none."""

    name: str
    weights: str
    follows: str | None
    reader: str | None

    @property
    def trained(self) -> str:
        """The weights with how they follow: what ways of the same weights share."""
        return self.weights if self.follows == AGAIN else f"{self.weights}-{self.follows}"

    @property
    def note(self) -> str:
        """A description of how the way follows the changes."""
        weights = "never trained" if self.follows is None else _NOTES[self.follows]
        reads = "" if self.reader is None else "; passages upserted and deleted in one index"
        return f"{self.name}: {self.weights}, {weights}{reads}"


def way(name: str) -> Way:
    """Reads a way's name, `WEIGHTS[-newest|-on][+READER]` or `READER`.

    Raises:
      UserError: it is none; weights that never train, or that cannot go on; a reader that does not
        search.
    """
    before, plus, reader = name.partition("+")
    weights, dash, follows = before.partition("-")
    if dash and follows not in (NEWEST, ON):
        names = [f"{one}-{how}" for one in WEIGHTS if one != BASE for how in (NEWEST, ON)]
        raise UserError(f"unknown way '{name[:60]}'. {nearest(before, [*names, *WEIGHTS])}")
    weights, read_by = parts(weights + plus + reader)
    if read_by == "oracle":
        raise UserError(
            f"'{name}' is told the passage that answers, so it follows no change; choose rag or hyde"
        )
    if weights in READING:
        raise UserError(f"'{name}': {weights} learns to read, no facts, so it follows no change")
    if dash and weights == BASE:
        raise UserError(f"'{name}' is never trained; choose lora-{follows} or full-{follows}")
    return Way(name, weights, None if weights == BASE else follows or AGAIN, read_by)


@dataclasses.dataclass(frozen=True)
class Update:
    """Cost of bringing a way up to a step.

    Attributes:
      seconds: training with its compilation, and embedding, changing and saving the index. Not
        counted are saving and loading weights.
      tokens: trained on, all passes, and embedded.
      flops: by formula.
      bytes_written: of weights or adapters, and of files of the index that are new or changed.
    """

    seconds: Amount = 0.0
    tokens: Count = 0
    flops: Amount = 0.0
    bytes_written: Count = 0

    def __add__(self, other: Update) -> Update:
        return Update(
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.bytes_written + other.bytes_written,
        )


class GoingOn(LoRA):
    """An adapter that goes on training from the one in `before`."""

    before: Path

    @property
    def start(self):
        return lora.load(self.before / ADAPTER, self.lab.params)[0]


def check(lab: Lab, follower: Way) -> None:
    """Raises `UserError` early for what `follow` would refuse: settings, models, an adapter that
    cannot go on."""
    method = _weights(lab, follower)
    method.check()
    spec = getattr(method, "spec", None)
    if follower.follows == ON and spec is not None and spec.changes_base:
        raise UserError(
            f"'{follower.name}' starts from a part of the base (init={spec.init}), so it cannot go on from an adapter; choose lora-on"
        )
    if follower.reader is not None:
        READERS[follower.reader](lab, follower.name, method).check()


def follow(
    lab: Lab, follower: Way, snapshots: Sequence[Snapshot], step_epochs: int
) -> tuple[Method, Update]:
    """Brings a way up to the last of some snapshots, from where the one before it left it. Returns
    the method that answers, and the cost.

    Args:
      lab: its folder keeps what is learned. A step that was learned is found there.
      snapshots: the world after steps 0, 1, ...
      step_epochs: passes over what a step brought.
    """
    method, cost = _train(lab, follower, snapshots, step_epochs)
    if follower.reader is None:
        return method, cost
    lab, update = _bring_up(lab, follower, snapshots)
    return READERS[follower.reader](lab, follower.name, method), cost + update


def forget(lab: Lab, number: int) -> None:
    """Deletes the weights of a step, which the steps behind the next one do not need."""
    for folder in lab.folder.glob(f"weights/*/{number}"):
        shutil.rmtree(folder)


def _weights(lab: Lab, follower: Way) -> Method:
    return WEIGHTS[follower.weights](lab, follower.weights)


def _train(
    lab: Lab, follower: Way, snapshots: Sequence[Snapshot], step_epochs: int
) -> tuple[Method, Update]:
    if follower.follows is None:
        return _weights(lab, follower), Update()
    number, now = len(snapshots) - 1, snapshots[-1]
    all_of_it = number == 0 or follower.follows == AGAIN
    folder = _folder(lab, follower, number)
    of_step = dataclasses.replace(
        lab.over(now.corpus if all_of_it else now.update, folder),
        log=lambda **row: lab.log(**{**row, "method": follower.trained, "change": number}),
    )
    if not all_of_it:
        train = dataclasses.replace(lab.settings.train, epochs=step_epochs)
        of_step = dataclasses.replace(
            of_step, settings=dataclasses.replace(lab.settings, train=train)
        )
    method = _weights(of_step, follower)
    if number and follower.follows == ON:
        before = _folder(lab, follower, number - 1) / follower.weights
        if isinstance(method, LoRA):
            method = GoingOn(of_step, follower.weights)
            method.before = before
        else:
            params = hub.load_trained(before, lab.params)
            method = _weights(dataclasses.replace(of_step, params=params), follower)
    method.learn()
    cost = method.cost()
    return method, Update(
        cost.train_seconds + cost.compile_seconds,
        cost.train_tokens,
        cost.train_flops_formula,
        cost.artifact_bytes,
    )


def _folder(lab: Lab, follower: Way, number: int) -> Path:
    # before the first step all ways of the same weights are one
    return lab.folder / "weights" / (follower.trained if number else follower.weights) / str(number)


def _bring_up(lab: Lab, follower: Way, snapshots: Sequence[Snapshot]) -> tuple[Lab, Update]:
    """Changes the index as the last step changes the passages. A start that was killed may have
    done so already: the index is taken back first, so that the whole step is timed."""
    folder = lab.folder / "index" / follower.name
    if lab.settings.retrieval.retriever != LEXICAL:
        _ = lab.embedder  # its loading is no part of a step

    def over(corpus: Corpus) -> Lab:
        return lab.over(corpus, folder)

    if len(snapshots) == 1:
        shutil.rmtree(folder, ignore_errors=True)
        new = snapshots[0].corpus.passages
    else:
        _, new = changes(over(snapshots[-2].corpus).store, snapshots[-1].corpus.passages)
    stamps = _stamps(folder)
    now = over(snapshots[-1].corpus)
    began = time.perf_counter()
    store = now.store
    seconds = time.perf_counter() - began
    written = sum(
        size
        for path, (*stamp, size) in _stamps(folder).items()
        if stamps.get(path) != (*stamp, size)
    )
    if store.index is None:
        return now, Update(seconds, 0, 0.0, written)
    tokens = sum(now.embedder.lengths([passage.text for passage in new]))
    return now, Update(seconds, tokens, now.embedding_flops(new), written)


def _stamps(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Returns what tells whether a file was written since: its inode, time and size."""
    return {
        path: (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        for path in folder.rglob("*")
        if path.is_file() and (stat := path.stat())
    }
