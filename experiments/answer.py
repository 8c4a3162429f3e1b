"""Asks a question, or many, of a model that has taken in a corpus by any of the methods.

    python -m experiments.answer --question="Where was Mira Toll born?"          retrieval (rag) over invented biographies
    python -m experiments.answer --corpus=DIR                                    your own documents, question after question
    python -m experiments.answer --run=runs/NAME --method=lora+rag               with what a comparison has trained and indexed
    python -m experiments.answer --run=runs/NAME                                 with what experiments.finetune has trained

Shows the answer, the passages that were in the prompt, the tokens and where the time went. Methods are those of experiments.compare;
an index is built on first use, training is not started here. With --run model, corpus and settings are the run's; only --k,
--max_new_tokens and --hyde_tokens may differ. Without --question, questions are read line by line; an empty line or Ctrl-D ends.
"""

from __future__ import annotations

import difflib
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.records import Corpus, Prediction, Question
from kafjax.core.rundir import Run, config_hash, open_run, read_json
from kafjax.methods import METHODS, Method
from kafjax.methods.oracle import Oracle
from kafjax.methods.trained import Trained

common.define_model_flags()
common.define_corpus_flags()
common.define_settings_flags()
common.define_mesh_flag()
flags.adopt_module_key_flags(common)
flags.DEFINE_string("method", "rag", f"How the model got its knowledge: {', '.join(METHODS)}.")
flags.DEFINE_string("question", None, "The question; without it, questions are read from the terminal.")
flags.DEFINE_string("run", None, "Folder of a run of experiments.compare or experiments.finetune whose work is used.")
flags.DEFINE_string("runs", "runs", "Folder in which an index is kept, without --run.")

# What may differ from the run that is asked: it changes the asking, not what was learned.
_ASKING = ("k", "max_new_tokens", "hyde_tokens", "batch")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    if values.question is not None and not values.question.strip():
        raise UserError('--question is empty; write --question="Where was ... born?", or leave it out to be asked')
    config = _take_over(Path(values.run)) if values.run else {}
    if values.method not in METHODS:
        raise UserError(f"unknown method '{values.method}'. {nearest(values.method, METHODS)}")
    settings = common.settings_from_flags()
    corpus = common.corpus_from_flags()
    identity = common.corpus_identity(corpus)
    if values.run:
        run = Run(Path(values.run))
        if "corpus_hash" in config and config["corpus_hash"] != identity.get("corpus_hash"):
            raise UserError(f"{values.corpus} has changed since {run.path} learned it; start a new run")
    else:
        own = {**common.config_from_flags(), **identity}
        run = Run(Path(values.runs) / f"answer-{config_hash(own)}")
    lab = common.open_lab(run, corpus, settings)
    method = METHODS[values.method](lab)
    _check_trained(method, run, config)
    method.check()
    if not values.run:
        open_run(run.path.parent, run.path.name, own).close()  # others may ask, too: nothing more is written but an index
    method.learn()
    if values.question is not None:
        _ask(method, corpus, values.question)
    else:
        _converse(method, corpus)


def _take_over(path: Path) -> dict[str, Any]:
    """Sets the flags to what the run was made with; returns its config."""
    if not (path / "config.json").is_file():
        siblings = [str(file.parent) for file in path.parent.glob("*/config.json")]
        there_are = nearest(str(path), siblings) if siblings else "There are no runs beside it."
        raise UserError(f"no run in '{path}' (no config.json). {there_are}")
    config = read_json(path / "config.json")
    for name, value in config.items():
        if name not in flags.FLAGS:
            continue
        flag = flags.FLAGS[name]
        if not flag.present:
            flag.value = value
        elif flag.value != value and name not in (*_ASKING, "method"):
            raise UserError(f"--{name}={flag.value} differs from {path}, which has {value!r}; leave the flag out, or start a new run")
    return config


def _check_trained(method: Method, run: Run, config: Mapping[str, Any]) -> None:
    """Takes over what `experiments.finetune` has trained. Raises `UserError` if weights are missing that have to be trained first."""
    weights = getattr(method, "weights", method)
    if isinstance(weights, Trained) and config.get("method") == weights.kind and (run.path / "result.json").exists():
        weights.adopt(run.path)
    if method.is_trained:
        return
    asked = {name: flags.FLAGS[name].value for name in common.config_from_flags()}
    options = [f"--{name}={value}" for name, value in asked.items() if value != flags.FLAGS[name].default]
    if config and "method" not in config:
        options += [f"--runs={run.path.parent}", f"--name={run.path.name}"]
        if "latency_queries" in config:
            options.append(f"--latency_queries={config['latency_queries']}")
        then = "then ask again"
    else:
        options.append("--name=NAME")
        then = "then ask with --run=runs/NAME"
    command = shlex.join(["python", "-m", "experiments.compare", f"--methods={weights.name}", *options])
    raise UserError(f"{method.name} has not been trained in {run.path}; run: {command}, {then}")


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
                print(f"error: {error}", file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print()


def _ask(method: Method, corpus: Corpus, text: str) -> None:
    question = _question(method, corpus, text)
    with common.compiling() as compiled:
        began = time.perf_counter()
        (prediction,) = method.answer([question])
        seconds = time.perf_counter() - began
    _show(prediction, corpus, seconds, sum(compiled))


def _question(method: Method, corpus: Corpus, text: str) -> Question:
    """The corpus's own question if it is one: then the right answer is known, and a passage that holds it."""
    known = {q.text.casefold(): q for q in (*corpus.retention, *corpus.questions)}
    question = known.get(text.strip().casefold(), Question(id="", text=text.strip(), answers=(), split=""))
    if isinstance(method, Oracle) and not question.passages:
        with_gold = [q.text for q in corpus.questions if q.passages]
        close = difflib.get_close_matches(text, with_gold, n=1, cutoff=0.0)
        example = f", such as '{close[0]}'" if close else ", and this one has none"
        raise UserError(f"oracle needs a question whose answering passage the corpus names{example}")
    return question


def _show(prediction: Prediction, corpus: Corpus, seconds: float, compiling: float) -> None:
    print(f"answer    {prediction.answer}")
    if prediction.answers:
        print(f"known     {' | '.join(prediction.answers)}  ({'right' if prediction.correct else 'wrong'})")
    texts = {passage.id: passage.text for passage in corpus.passages}
    for rank, id in enumerate(prediction.passages, 1):
        print(f"{'passages' if rank == 1 else '':8}  {rank}. [{id}] {texts[id]}")
    calls = "" if prediction.calls == 1 else f", {prediction.calls} calls"
    print(f"tokens    {prediction.prompt_tokens} prompt ({prediction.cached_tokens} cached), {prediction.output_tokens} output{calls}")
    stages = ", ".join(f"{stage} {1000 * s:.1f}" for stage, s in prediction.seconds.items())
    print(f"ms        {stages}, total {1000 * seconds:.1f}")
    if compiling:
        print(f"          {1000 * compiling:.0f} of them for compiling, once for texts of such a length")
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
