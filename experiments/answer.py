"""Asks a question, or many, of a model that has taken in a corpus by any of the methods.

    python -m experiments.answer --question="Where was Mira Toll born?"          retrieval (rag) over invented biographies
    python -m experiments.answer --corpus=DIR                                    your own documents, question after question
    python -m experiments.answer --index=INDEX                                   an index of experiments.build_index: no corpus is read
    python -m experiments.answer --run=runs/NAME --method=lora+rag               with what a comparison has trained and indexed
    python -m experiments.answer --run=runs/NAME                                 with what experiments.finetune has trained

Shows the answer, the passages that were in the prompt with their files and lines, the tokens and
where the time went. Methods are those of experiments.compare. An index is built on first use; a
file that is added or changed later is embedded alone. Training is not started here. With --run
model, corpus and settings are the run's; only --k, --retriever, --reranker, --candidates, --index,
--max_new_tokens and --hyde_tokens may differ. Without --question, questions are read line by line;
an empty line or Ctrl-D ends.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import build
from experiments.compiling import compiling
from experiments.configs.answer import Answer
from experiments.configs.compare import Compare
from experiments.configs.shared import OFF
from kafjax.core.command_line import command_of, given
from kafjax.core.config import changed, leaves
from kafjax.core.config_record import read_record, record
from kafjax.core.errors import UserError, check_text, nearest, report
from kafjax.core.paths import as_path
from kafjax.core.progress import LINE_SECONDS, waiting
from kafjax.core.records import Corpus, Passage, Prediction, Question
from kafjax.core.rundir import Run, find_run, open_run, read_object
from kafjax.core.text import visible
from kafjax.corpus import CorpusConfig, open_corpus
from kafjax.generation.config import LONGEST_LIMIT, SHORTEST_LIMIT
from kafjax.methods import Method, open_method, parts
from kafjax.methods.oracle import Oracle
from kafjax.methods.trained import Trained

# What may differ from the run that is asked: it changes the asking, not what was learned.
_ASKING = (
    "k",
    "retriever",
    "reranker",
    "candidates",
    "max_new_tokens",
    "hyde_tokens",
    "method",
    "mesh",
    "index",
)
_OF_AN_INDEX = ("base", "rag", "hyde", "rewrite")
"""Methods that need no more than passages."""


def run(config: Answer) -> None:
    """Answers one question, or those that are typed.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    if config.question is not None and not config.question.strip():
        raise UserError(
            '--question is empty; write --question="Where was ... born?", or leave it out to be asked'
        )
    parts(config.method)
    # Nobody asks alone for a short reply: models stop by themselves.
    config = changed(
        config, max_new_tokens=config.settings.generation.max_new_tokens or LONGEST_LIMIT
    )
    settings = dataclasses.replace(
        config.settings, train=dataclasses.replace(config.settings.train, seed=config.seed)
    )
    stored = _stored(as_path(config.run)) if config.run else {}
    corpus = _open_corpus(config, stored)
    template = build.open_template(config.model.model, config.model.chat)
    also = build.corpus_identity(config.corpus, corpus) | build.chat_identity(template)
    indexed = _without_asking(config)
    if config.run:
        folder = Run(as_path(config.run))
        if build.CORPUS_HASH in stored and stored[build.CORPUS_HASH] != also.get(build.CORPUS_HASH):
            raise UserError(
                f"{config.corpus.corpus} has changed since {folder.path} learned it; start a new run"
            )
        if stored.get(build.CHAT_TEMPLATE) != also.get(build.CHAT_TEMPLATE):
            raise UserError(
                f"the chat template of {config.model.model} has changed since {folder.path} was asked by it; start a new run"
            )
    elif config.index:
        folder = Run(as_path(config.index))  # nothing is written
    else:
        # Whatever documents hold: where they change, their index changes with them.
        also.pop(build.CORPUS_HASH, None)
        folder = find_run(as_path(config.runs), None, indexed, prefix="answer", also=also)
    lab = build.open_lab(
        config.model,
        settings,
        config.mesh,
        folder,
        corpus,
        template,
        trains=False,
        index=config.index,
    )
    method = open_method(lab, config.method)
    _check_trained(config, method, folder, stored)
    method.check()
    if not (config.run or config.index):
        opened = open_run(as_path(config.runs), None, indexed, prefix="answer", also=also)
        opened.close()  # others may ask, too: nothing more is written but an index
    method.learn()
    if config.question is not None:
        _ask(method, corpus, config.question)
    else:
        _converse(method, corpus)


def _open_corpus(config: Answer, stored: Mapping[str, Any]) -> Corpus:
    """Opens the documents; none for an index, which is all that its methods need. What a run
    measured forgetting by belongs to its corpus."""
    if config.run:
        beside = (leaf for leaf in leaves(CorpusConfig()) if leaf.flag in ("retention", "held_out"))
        sizes = {leaf.flag: stored.get(leaf.flag, leaf.default) for leaf in beside}
        return open_corpus(changed(config.corpus, **sizes), config.seed, needs_questions=False)
    if not config.index:
        return open_corpus(config.corpus, config.seed, needs_questions=False)
    if config.method not in _OF_AN_INDEX:
        others = ", ".join(_OF_AN_INDEX)
        raise UserError(
            f"--method={config.method} needs more than the passages of --index; it goes with {others}, or with --run"
        )
    if config.corpus != Answer().corpus:
        raise UserError(
            "--index holds the passages: leave --corpus and its settings out, or leave --index out"
        )
    return Corpus(name=config.index, documents=(), passages=(), training_questions=(), questions=())


def _without_asking(config: Answer) -> Answer:
    """Returns what names the folder of an index: it stays the same, however it is asked. BM25 alone
    has another kind of index."""
    asking = {
        leaf.flag: leaf.default
        for leaf in leaves(Answer())
        if leaf.flag in _ASKING and leaf.flag != "retriever"
    }
    # which earlier releases had as the default
    return changed(config, **{**asking, "max_new_tokens": SHORTEST_LIMIT})


def _stored(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        siblings = [str(file.parent) for file in path.parent.glob("*/config.json")]
        there_are = nearest(str(path), siblings) if siblings else "There are no runs beside it."
        raise UserError(f"no run in '{path}' (no config.json). {there_are}")
    return read_object(path / "config.json")


def _take_over() -> dict[str, Any]:
    """Returns the settings of the run that is asked, by flag. Raises `UserError` for a flag that
    contradicts them."""
    if flags.FLAGS.run is None:
        return {}
    path = as_path(flags.FLAGS.run)
    stored = _stored(path)
    known = {leaf.flag for leaf in leaves(Answer())}
    # The run's own limit is made for its questions.
    taken = read_record(
        Answer,
        stored,
        path / "config.json",
        ignore={"max_new_tokens", *(stored.keys() - known)},
    )
    for name, value in given(Answer).items():
        if name in taken and name not in _ASKING and value != taken[name]:
            raise UserError(
                f"--{name}={value} differs from {path}, which has {taken[name]!r}; leave the flag out, or start a new run"
            )
    # a record without it is of a release that asked in plain text
    return {"chat": OFF, **taken}


def _check_trained(config: Answer, method: Method, folder: Run, stored: dict[str, Any]) -> None:
    """Takes over what `experiments.finetune` has trained. Raises `UserError` if weights are missing
    that have to be trained first."""
    weights = getattr(method, "weights", method)
    if (
        isinstance(weights, Trained)
        and stored.get("method") == weights.name
        and (folder.path / "result.json").exists()
    ):
        weights.adopt(folder.path)
    if method.is_trained:
        return
    known = {leaf.flag for leaf in leaves(Compare())}
    of_run = {key: value for key, value in stored.items() if key in known}
    values = {**read_record(Compare, of_run, folder.path / "config.json"), **record(config)}
    # not the limit of a question asked alone
    values |= {"methods": (weights.name,), "max_new_tokens": stored.get("max_new_tokens")}
    then = "ask with --run=runs/NAME"
    if stored and "method" not in stored:
        values |= {"runs": str(folder.path.parent), "name": folder.path.name}
        then = "ask again"
    else:
        values["name"] = "NAME"
    command = command_of("experiments.compare", Compare, values)
    raise UserError(
        f"{method.name} has not been trained in {folder.path}; run: {command}, then {then}"
    )


def _converse(method: Method, corpus: Corpus) -> None:
    try:
        import readline  # noqa: F401  gives input() a history and editing keys, where there is one
    except ImportError:
        pass
    try:
        while text := input("\nquestion> " if sys.stdin.isatty() else "").strip():
            try:
                _ask(method, corpus, text)
            except UserError as error:
                report(error)
    except (EOFError, KeyboardInterrupt):
        print()


def _ask(method: Method, corpus: Corpus, text: str) -> None:
    question = _question(method, corpus, text)
    with compiling() as compiled, waiting("answer", "reading and writing", after=LINE_SECONDS):
        began = time.perf_counter()
        (prediction,) = method.answer([question])
        seconds = time.perf_counter() - began
    by_id = {passage.id: passage for passage in corpus.passages}
    found = [
        by_id[id] if id in by_id else method.lab.store.passage(id) for id in prediction.passages
    ]
    _show(prediction, found, seconds, sum(compiled))


def _question(method: Method, corpus: Corpus, text: str) -> Question:
    """The corpus's own question if it is one: then the right answer is known, and a passage that
    holds it."""
    check_text(text, "the question")
    known = {q.text.casefold(): q for q in (*corpus.retention, *corpus.questions)}
    question = known.get(
        text.strip().casefold(), Question(id="", text=text.strip(), answers=(), split="")
    )
    if isinstance(method, Oracle) and not question.passages:
        with_gold = [q.text for q in corpus.questions if q.passages]
        close = difflib.get_close_matches(text, with_gold, n=1, cutoff=0.0)
        example = f", such as '{close[0]}'" if close else ", and this one has none"
        raise UserError(
            f"oracle needs a question whose answering passage the corpus names{example}"
        )
    return question


def _show(
    prediction: Prediction, passages: Sequence[Passage], seconds: float, compiling: float
) -> None:
    print(f"answer    {visible(prediction.answer)}")
    if prediction.cut:
        print(f"          cut at {prediction.output_tokens} tokens; --max_new_tokens allows more")
    if prediction.answers:
        print(
            f"known     {visible(' | '.join(prediction.answers))}  ({'right' if prediction.correct else 'wrong'})"
        )
    for rank, passage in enumerate(passages, 1):
        text = visible(passage.text).replace("\n", f"\n{'':13}")
        print(f"{'passages' if rank == 1 else '':8}  {rank}. [{visible(passage.id)}] {text}")
        if passage.source is not None:
            print(f"{'':13}from {visible(str(passage.source))}")
    calls = "" if prediction.calls == 1 else f", {prediction.calls} calls"
    print(
        f"tokens    {prediction.prompt_tokens} prompt ({prediction.cached_tokens} cached), {prediction.output_tokens} output{calls}"
    )
    stages = ", ".join(f"{stage} {1000 * s:.1f}" for stage, s in prediction.seconds.items())
    print(f"ms        {stages}, total {1000 * seconds:.1f}")
    if compiling:
        print(
            f"          {1000 * compiling:.0f} of them for compiling, once for texts of such a length"
        )
    sys.stdout.flush()


def main() -> None:
    build.start(Answer, run, _take_over)


if __name__ == "__main__":
    main()
