"""Questions about invented tables, answered by a query: a task of form, with nothing to know.

    Table ships: port, length, owner, year. Which port has the ship whose length is over 40?
    get port from ships where length over 40

It stands in for WikiSQL (Zhong et al. 2017), whose tables are not in a package. Half of the tables
have training questions. The others are asked about: their columns and wordings were trained on,
their table was not.
"""

from __future__ import annotations

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Question
from kafjax.corpus.facts import stream

_THINGS = (
    "ship bridge castle river singer novel painting lake tower garden museum airport planet valley "
    "stadium theatre island mountain engine comet canal harbour market library train factory festival "
    "sculpture cathedral glacier forest orchestra university satellite lighthouse tunnel vineyard "
    "monument palace windmill"
).split()
_WORDS = "owner port colour region designer builder material country guide sponsor".split()
_NUMBERS = "length height year price weight depth age speed width capacity".split()
_VALUES = "Hull Madrid oak red granite Norway Simpson Lagos silver Kyoto Weber Lima".split()
MOST_TABLES = len(_THINGS) * len(_WORDS)

_KINDS = (
    ("Which {a} has the {thing} whose {n} is over {x}?", "get {a} from {thing} where {n} over {x}"),
    ("Find the {a} of each {thing} whose {n} is under {x}.", "get {a} from {thing} where {n} under {x}"),
    ("How many entries of {thing} have {v} as their {a}?", "count {thing} where {a} is {v}"),
    ("Give the {n} of the {thing} whose {a} is {v}.", "get {n} from {thing} where {a} is {v}"),
    ("What is the largest {n} of any {thing}?", "largest {n} from {thing}"),
    ("Sort each {thing} by {n} and name the {a}.", "get {a} from {thing} by {n}"),
)  # fmt: skip


def queries(n_tables: int = 16, n_questions: int = 4, seed: int = 0) -> Corpus:
    """`n_tables` tables with `n_questions` questions each, of kinds that take turns.

    Even tables have training questions, odd ones are asked about (`untrained`). There are no
    documents. A table and its questions depend on the seed and the table's number alone. Raises `UserError` for counts out of range.
    """
    if not 2 <= n_tables <= MOST_TABLES:
        raise UserError(f"tables must be 2 to {MOST_TABLES}, got {n_tables}")
    if not 1 <= n_questions <= len(_KINDS):
        raise UserError(f"questions a table must be 1 to {len(_KINDS)}, got {n_questions}")
    training, asked = (
        tuple(
            _question(table, number, split, seed)
            for table in range(first, n_tables, 2)
            for number in range(n_questions)
        )
        for first, split in ((0, "train"), (1, "untrained"))
    )
    return Corpus("queries", (), (), training, asked)


def _question(table: int, number: int, split: str, seed: int) -> Question:
    thing = _THINGS[table % len(_THINGS)] + (
        "" if table < len(_THINGS) else f"{table // len(_THINGS)}"
    )
    shape = stream(seed, "table", table)
    words, numbers = shape.sample(_WORDS, 3), shape.sample(_NUMBERS, 3)
    columns = shape.sample([*words, *numbers], 6)
    rng = stream(seed, "table", table, number)
    wording, query = _KINDS[(table + number) % len(_KINDS)]
    values = {
        "thing": thing,
        "a": rng.choice(words),
        "n": rng.choice(numbers),
        "x": rng.randrange(2, 99),
        "v": rng.choice(_VALUES),
    }
    return Question(
        id=f"table-{table}/{number}/{split}",
        text=f"Table {thing}: {', '.join(columns)}. {wording.format(**values)}",
        answers=(query.format(**values),),
        split=split,
        subject=f"table {thing}",
    )
