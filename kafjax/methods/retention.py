"""The retention suite: what weights still know of other matters, and whether what they no longer
say is lost or only out of form.

Each prediction of split `retention` gets two scores beside that of its own reply:

    likeliest    the right answer is likelier than each of three wrong ones of its kind
    realigned    the right answer is said after ten examples of other such questions were trained on (as of "spurious
                 forgetting", Zheng et al. 2025, arXiv:2501.13453): what comes back was there, and only out of form

Methods with a reader get none: what they say with retrieved passages in the prompt is their own
reply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kafjax import lora
from kafjax.core import trees
from kafjax.core.records import Prediction, Question
from kafjax.corpus.retention import alternatives
from kafjax.evaluation.results import LIKELIEST, REALIGNED, RETENTION
from kafjax.methods.examples import question_examples
from kafjax.methods.lab import Lab
from kafjax.methods.method import ClosedBook, Method
from kafjax.parallel import n_data_shares
from kafjax.training import TrainConfig, train

RATE = 1e-4
"""Learning rate of realignment: enough for a form, hardly for a fact."""


class _Realigned(ClosedBook):
    """Answers with weights that are given."""

    def __init__(self, lab: Lab, name: str, params: trees.Tree):
        super().__init__(lab, name)
        self._params = params

    @property
    def params(self) -> trees.Tree:
        return self._params


def examine(method: Method, predictions: Sequence[Prediction], n_examples: int) -> list[Prediction]:
    """Returns the predictions, those of split `retention` with the scores of the suite.

    Args:
      n_examples: questions of the replay set to realign with; 0 realigns nothing.
    """
    asked = method.lab.corpus.retention
    if not isinstance(method, ClosedBook) or not asked:
        return list(predictions)
    others = alternatives(asked)
    weighed = [question for question in asked if question.id in others]
    nats = method.weigh(weighed, [(q.answers[0], *others[q.id]) for q in weighed])
    scores: dict[str, dict[str, float]] = {question.id: {} for question in asked}
    for question, (right, *wrong) in zip(weighed, nats, strict=True):
        scores[question.id][LIKELIEST] = float(right > max(wrong))
    if examples := method.lab.corpus.replay_questions[:n_examples]:
        realigned = _Realigned(method.lab, method.name, _realign(method, examples))
        for answer in realigned.answer(asked):
            scores[answer.id][REALIGNED] = float(answer.correct)
    return [
        dataclasses.replace(p, score={**p.score, **scores[p.id]}) if p.split == RETENTION else p
        for p in predictions
    ]


def _realign(method: Method, examples: Sequence[Question]) -> trees.Tree:
    """Trains a small adapter on some questions, once each, and merges it into the method's
    weights. It is the same for all methods, also for those that trained all weights. A step takes
    one question, or as many as the mesh splits its rows into."""
    lab = method.lab
    trained = question_examples(examples, lab.tokenizer, lab.prompts)
    shares = n_data_shares(lab.mesh)
    config = TrainConfig(
        steps=-(-len(trained) // shares),
        learning_rate=RATE,
        batch_rows=shares,
        seq_len=max(len(example.tokens) for example in trained),
        checkpoint_every=0,
        loss_chunk=lab.settings.train.loss_chunk,
    )
    result = train(
        lab.model,
        method.params,
        [trained],
        config,
        spec=lora.Spec(),
        mesh=lab.mesh,
        label=f"{method.name}: realigning",
    )
    return lora.merge(method.params, result.trainable, lora.Spec())
