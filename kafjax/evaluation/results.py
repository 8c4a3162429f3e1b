"""results.json: every quality value as {value, low, high, n}, every cost, and what follows from
comparing the arms.

    {"methods": {"lora": {"quality": {"seen": {...}, "paraphrase": {...}, "paraphrase_f1": {...}, ...}, "cost": {...}, "note": ""}, ...},
     "pending": ["full", ...], "comparisons": [...], "break_even": [...], "error_budget": {...}, "config": {...}, "environment": {...}}

The headline split is `untrained`: questions about subjects of which only documents were trained. It
is the one split that measures learning from documents; `paraphrase` and `seen` are about facts
whose questions were trained. Comparisons are made per split.

Questions about one subject are learned or missed together. So intervals draw whole subjects anew,
and tests flip the signs of whole subjects (`clustered`).

Quality keys are flat: a split's name alone is its share of correct answers (`contains`),
`SPLIT_METRIC` its other metrics; `recall_at_k` and `mrr` are over all questions that have gold
passages; `retention_change` is the paired change from the base model; `perplexity` and
`perplexity_ratio` (over the base model's) are on held-out text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kafjax.core.records import RELATIONS, Prediction, relation_of
from kafjax.evaluation import clustered, intervals
from kafjax.evaluation.clustered import FEW, Difference, cells, mean_of_questions
from kafjax.evaluation.cost import (
    TOTAL,
    Cost,
    break_even,
    break_even_interval,
    break_even_rule,
)
from kafjax.evaluation.error_budget import attribute, error_budget, retrieves
from kafjax.evaluation.intervals import Interval

BASE = "base"
ORACLE = "oracle"
RETENTION = "retention"
HEADLINE = "untrained"
PARAPHRASE, SEEN = "paraphrase", "seen"
ALL = "all"
"""All questions of a corpus that sets none apart, in a run that trains nothing: see
`as_one_split`."""
KNOWLEDGE = (HEADLINE, PARAPHRASE, SEEN)
DEVELOPMENT, CONTROL = "development", "control"
ASIDE = (DEVELOPMENT, CONTROL, RETENTION)
"""Splits that no claim about knowledge is made on: those that settings are chosen by, questions
that no document answers, and other matters."""
RAG = "rag"
LIKELIEST, REALIGNED = "likeliest", "realigned"
"""Scores of the retention suite (`methods.retention`)."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Results of one finished method.

    `predictions` are scored. `held_out_nll` are summed negative log-likelihoods in nats and
    `held_out_tokens` token counts of the held-out texts, in the same order for every arm. `oracle`
    are predictions of this arm's weights with only a gold passage in the prompt; an arm with the
    base model's weights takes them from the arm named `oracle`. `note` is shown under the table.
    `environment` is what the arm was computed by: versions, commit, machine, hash of the base
    model's weights.
    """

    predictions: Sequence[Prediction]
    cost: Cost
    held_out_nll: Sequence[float] = ()
    held_out_tokens: Sequence[int] = ()
    oracle: Sequence[Prediction] = ()
    note: str = ""
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def ordered(splits: Collection[str]) -> list[str]:
    """Sorts splits for showing: the headline, the other known ones, the user's own, then those of
    `ASIDE`."""
    known = [split for split in KNOWLEDGE if split in splits]
    others = [split for split in splits if split not in (*KNOWLEDGE, *ASIDE)]
    return [*known, *others, *(split for split in ASIDE if split in splits)]


def headline(splits: Collection[str]) -> str | None:
    """Picks the split that verdicts are about: `untrained`, else the first one there is in the
    order of `ordered`; `development` only where nothing else was asked."""
    claims = [split for split in ordered(splits) if split not in ASIDE]
    return next(iter(claims), DEVELOPMENT if DEVELOPMENT in splits else None)


def splits_of(results: Mapping[str, Any]) -> list[str]:
    """Lists the splits that have scores in results.json, in the order of `ordered`."""
    keys = dict.fromkeys(key for method in results["methods"].values() for key in method["quality"])
    return ordered(
        [key.removesuffix("_exact_match") for key in keys if key.endswith("_exact_match")]
    )


def as_one_split(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Puts the knowledge questions of all arms into the split `ALL`: where nothing was trained,
    `seen` and `untrained` mean the same."""

    def whole(arm: Arm) -> Arm:
        predictions = [
            p if p.split in ASIDE else dataclasses.replace(p, split=ALL) for p in arm.predictions
        ]
        return dataclasses.replace(arm, predictions=predictions)

    return {name: whole(arm) for name, arm in arms.items()}


def summarise(arm: Arm, base: Arm | None = None) -> dict[str, Interval]:
    """Quality of one arm, keyed as the module says. `base` is the untouched model's arm, for the
    changes from it."""
    quality: dict[str, Interval] = {}
    for split in dict.fromkeys(p.split for p in arm.predictions):
        of_split = [p for p in arm.predictions if p.split == split]
        quality[split] = mean_of_questions(of_split, [float(p.correct) for p in of_split])
        for metric in dict.fromkeys(
            name for p in of_split for name in p.score if name != "contains"
        ):
            quality[f"{split}_{metric}"] = _metric(of_split, metric)
    quality |= _by_relation([p for p in arm.predictions if p.split == RETENTION])
    for metric in ("recall_at_k", "mrr"):
        if any(metric in p.score for p in arm.predictions):
            quality[metric] = _metric(arm.predictions, metric)
    if base is not None and base is not arm:
        retention = [_split(one.predictions, RETENTION) for one in (arm, base)]
        if all(retention):
            change = compare_arms(arm.predictions, base.predictions, RETENTION).difference
            quality[f"{RETENTION}_change"] = change
    if len(arm.held_out_nll):
        quality["perplexity"] = intervals.perplexity(arm.held_out_nll, arm.held_out_tokens)
        if base is not None and base is not arm and len(base.held_out_nll):
            quality["perplexity_ratio"] = intervals.perplexity_ratio(
                arm.held_out_nll, base.held_out_nll, arm.held_out_tokens
            )
    return quality


def _by_relation(predictions: Sequence[Prediction]) -> dict[str, Interval]:
    """Returns the shares of a relation's answers that are said, and that are the likeliest:
    `retention_capital`, `retention_capital_likeliest`."""
    found: dict[str, Interval] = {}
    for relation in RELATIONS:
        asked = [p for p in predictions if relation_of(p.id) == relation]
        if asked:
            name = f"{RETENTION}_{relation}"
            found[name] = mean_of_questions(asked, [float(p.correct) for p in asked])
            if any(LIKELIEST in p.score for p in asked):
                found[f"{name}_{LIKELIEST}"] = _metric(asked, LIKELIEST)
    return found


def forgotten(arm: Arm, base: Arm) -> float | None:
    """Change of the cross entropy of held-out prose from the base model's, nats a token. None
    without texts."""
    if not arm.held_out_tokens or len(arm.held_out_nll) != len(base.held_out_nll):
        return None
    return (sum(arm.held_out_nll) - sum(base.held_out_nll)) / sum(arm.held_out_tokens)


def compare_arms(a: Sequence[Prediction], b: Sequence[Prediction], split: str) -> Difference:
    """Compares the correctness of two arms on the questions of a split, paired by question and
    clustered by subject."""
    (compared,) = clustered.compare([_cells(a, b, split)])
    return compared


def _cells(
    a: Sequence[Prediction], b: Sequence[Prediction], split: str
) -> tuple[clustered.Cells, clustered.Cells]:
    one, other = (_split(arm, split) for arm in (a, b))
    for arm in (one, other):
        if len({p.id for p in arm}) != len(arm):
            raise ValueError("a paired comparison needs arms that answered each question once")
    return cells({0: one}), cells({0: other})


def collect(
    arms: Mapping[str, Arm],
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    pending: Sequence[str] = (),
) -> dict[str, Any]:
    """The contents of results.json for the arms that are done, in their order; `pending` names
    those still to come."""
    base = arms.get(BASE)
    first = headline(_splits(arms.values()))
    methods = {
        name: {
            "quality": {key: interval.to_json() for key, interval in summarise(arm, base).items()},
            "cost": arm.cost.to_json(),
            "note": arm.note,
            "replies_cut": sum(prediction.cut for prediction in arm.predictions),
            "environment": dict(arm.environment),
        }
        for name, arm in arms.items()
    }
    return {
        "methods": methods,
        "pending": list(pending),
        "comparisons": _comparisons(arms),
        "break_even": [_break_even(arms, *pair) for pair in _trained_and_retrieving(arms)],
        "error_budget": {
            name: {
                cause: share.to_json()
                for cause, share in error_budget(*_causes_from(name, arms, first)).items()
            }
            for name, arm in arms.items()
        },
        "config": dict(config),
        "environment": dict(environment),
    }


def _comparisons(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Makes the contrasts of `contrasts` on every split of knowledge. Holm's correction is over
    those of one split.

    The oracle can answer only questions whose gold passage is known: others are compared with it on
    those.
    """
    with_gold = {p.id for p in arms[ORACLE].predictions} if ORACLE in arms else set()

    def predictions(name: str, other: str) -> list[Prediction]:
        return [
            p for p in arms[name].predictions if ORACLE not in (name, other) or p.id in with_gold
        ]

    rows = []
    for split in _knowledge_splits(arms.values()):
        pairs = contrasts(list(arms))
        compared = clustered.compare(
            [_cells(predictions(a, b), predictions(b, a), split) for a, b in pairs]
        )
        rows += [
            {"split": split, "a": a, "b": b, **dataclasses.asdict(comparison)}
            for (a, b), comparison in zip(pairs, compared, strict=True)
        ]
    return rows


def contrasts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Lists the pairs that are tested: each arm against `rag`, and each against `base`. Where
    neither is there, all pairs.

    They were fixed before any run of the study: 13 contrasts of eight arms find smaller differences
    than all 28 pairs do after Holm's correction.
    """
    references = [name for name in (RAG, BASE) if name in names]
    if not references:
        return list(itertools.combinations(names, 2))
    return [
        (name, reference)
        for reference in references
        for name in names
        if name != reference and (name, reference) != (BASE, RAG)
    ]


def _splits(arms: Iterable[Arm]) -> list[str]:
    return ordered(dict.fromkeys(p.split for arm in arms for p in arm.predictions))


def _knowledge_splits(arms: Iterable[Arm]) -> list[str]:
    return [split for split in _splits(arms) if split not in ASIDE]


def _trained_and_retrieving(arms: Mapping[str, Arm]) -> list[tuple[str, str]]:
    trained = [
        name
        for name, arm in arms.items()
        if arm.cost.train_tokens and not retrieves(arm.predictions)
    ]
    from_index = [
        name
        for name, arm in arms.items()
        if not arm.cost.train_tokens and retrieves(arm.predictions) and name != ORACLE
    ]
    return list(itertools.product(trained, from_index))


def _break_even(arms: Mapping[str, Arm], trained: str, retrieval: str) -> dict[str, Any]:
    """Counts the queries after which `trained` has been cheaper than `retrieval`: by the rule of
    thumb, by FLOPs (formula), by the clock.

    None is never; `queries_seconds` and its 95% interval over the queries that were timed are
    missing where latency was not measured. `accuracy` compares
    the arms on each split; `comparable` is False where they differ significantly, or subjects are
    too few to show that they do: then the cheaper one is no substitute for that kind of question.
    """
    learn, look_up = arms[trained].cost, arms[retrieval].cost
    read = look_up.llm_tokens_per_query.prompt - look_up.llm_tokens_per_query.cached
    read_anyway = learn.llm_tokens_per_query.prompt - learn.llm_tokens_per_query.cached
    pair = arms[trained], arms[retrieval]
    accuracy = {
        split: compare_arms(*(arm.predictions for arm in pair), split)
        for split in _knowledge_splits(pair)
    }
    row = {
        "trained": trained,
        "retrieval": retrieval,
        "queries_rule": break_even_rule(
            learn.train_tokens, read - read_anyway, adapter_only=learn.adapter_only
        ),
        "queries_flops": break_even(
            learn.train_flops_formula - look_up.index_flops_formula,
            look_up.query_flops_formula - learn.query_flops_formula,
        ),
        "accuracy": {
            split: {
                "difference": comparison.difference.to_json(),
                "p_value": comparison.p_value,
                "verdict": comparison.verdict,
                "comparable": comparison.difference.n >= FEW
                and comparison.verdict in ("equivalent", "undecided"),
            }
            for split, comparison in accuracy.items()
        },
    }
    if look_up.latency_seconds and learn.latency_seconds:
        dear, cheap = look_up.latency_seconds[TOTAL], learn.latency_seconds[TOTAL]
        extra = learn.train_seconds - look_up.index_seconds
        row["queries_seconds"] = break_even(extra, dear["mean"] - cheap["mean"])
        row["queries_seconds_interval"] = break_even_interval(extra, dear, cheap)
    return row


def causes_of(arms: Mapping[str, Arm]) -> dict[str, dict[str, str]]:
    """Returns of each arm the cause of each answer to a knowledge question, by the question's id
    (see `attribute`)."""
    return {name: attribute(*_causes_from(name, arms)) for name in arms}


def _causes_from(
    name: str, arms: Mapping[str, Arm], split: str | None = None
) -> tuple[Sequence[Prediction], ...]:
    """Returns the predictions that tell the causes of an arm's answers, to the questions of a split
    or of all: its own, those of its weights with a gold passage alone, and those of its weights
    without passages."""
    arm, (weights, plus, _) = arms[name], name.partition("+")

    def asked(predictions: Sequence[Prediction]) -> list[Prediction]:
        return [p for p in predictions if (p.split == split if split else p.split not in ASIDE)]

    own = asked(arm.predictions)
    closed_book = arms.get(weights if plus else BASE) if retrieves(arm.predictions) else None
    alone = [] if closed_book is None else asked(closed_book.predictions)
    return own, asked(_oracle_for(arm, arms)), alone


def _oracle_for(arm: Arm, arms: Mapping[str, Arm]) -> Sequence[Prediction]:
    if arm.oracle or arm.cost.trainable_parameters or ORACLE not in arms:
        return arm.oracle
    return arms[ORACLE].predictions


def _metric(predictions: Sequence[Prediction], metric: str) -> Interval:
    scored = [p for p in predictions if metric in p.score]
    return mean_of_questions(scored, [p.score[metric] for p in scored])


def _split(predictions: Sequence[Prediction], split: str) -> list[Prediction]:
    return [p for p in predictions if p.split == split]
