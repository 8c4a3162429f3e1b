"""Properties of knowledge that changes: for any sizes and seeds, not for one example."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.corpus.stream import (
    DELETED,
    EARLIER,
    NEW,
    OLD,
    Change,
    World,
    apply,
    draw,
    snapshot,
    start,
)
from kafjax.corpus.worlds import biographies_world, open_world

SIZES = st.fixed_dictionaries(
    {
        "subjects": st.integers(6, 12),
        "attributes": st.integers(1, 4),
        "steps": st.integers(1, 4),
        "added": st.integers(0, 2),
        "edited": st.integers(1, 2),
        "deleted": st.integers(0, 1),
        "seed": st.integers(0, 50),
    }
)
properties = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def make(sizes: dict, steps: int | None = None) -> tuple[World, tuple[tuple[Change, ...], ...]]:
    steps = sizes["steps"] if steps is None else steps
    world = biographies_world(
        sizes["subjects"], sizes["added"] * steps, sizes["attributes"], sizes["seed"]
    )
    counts = {name: sizes[name] for name in ("added", "edited", "deleted")}
    try:
        return world, draw(world, steps, **counts, seed=sizes["seed"])
    except UserError:  # one attribute and many deletions leave nothing to change
        return world, ()


def states(world: World, steps: tuple[tuple[Change, ...], ...]) -> list[dict]:
    found = [start(world)]
    for step in steps:
        found.append(apply(found[-1], step))
    return found


@properties
@given(SIZES)
def test_a_step_changes_each_fact_once_and_as_many_as_are_asked_for(sizes):
    _, steps = make(sizes)
    for step in steps:
        assert len({change.key for change in step}) == len(step)
        assert len({c.key[0] for c in step if c.before is None}) == sizes["added"]
        assert sum(c.before is not None and c.after is not None for c in step) == sizes["edited"]
        assert sum(c.after is None for c in step) == sizes["deleted"]
        assert all(c.before != c.after for c in step)


@properties
@given(SIZES)
def test_the_state_is_the_fold_of_the_changes_and_what_is_deleted_stays_so(sizes):
    world, steps = make(sizes)
    for number, state in enumerate(states(world, steps)):
        last = {c.key: c.after for step in steps[:number] for c in step}
        for key, value in last.items():
            assert state.get(key) == value
        untouched = {key: value for key, value in start(world).items() if key not in last}
        assert {key: state[key] for key in state if key not in last} == untouched
    gone = [c.key for step in steps for c in step if c.after is None]
    assert len(set(gone)) == len(gone)


@properties
@given(SIZES)
def test_more_steps_change_no_earlier_one(sizes):
    _, steps = make(sizes)
    _, more = make(sizes, sizes["steps"] + 1)
    assert not more or more[: len(steps)] == steps


@properties
@given(SIZES)
def test_subjects_with_training_questions_never_change_and_values_never_come_back(sizes):
    world, steps = make(sizes)
    trained = {subject.id for subject in world.subjects if subject.asked_in_training}
    had = {key: [value] for key, value in start(world).items()}
    for step in steps:
        for change in step:
            assert change.key[0] not in trained
            if change.after is not None:
                assert change.after not in had.setdefault(change.key, [])
                had[change.key].append(change.after)


@functools.cache
def snapshots(seed: int = 0):
    world = biographies_world(6, 6, 3, seed)
    steps = draw(world, 3, added=2, edited=2, deleted=1, seed=seed)
    sizes = {"n_documents": 3, "questions_per_fact": 2, "seed": seed}
    return world, steps, [snapshot(world, steps[:n], **sizes) for n in range(4)]


@pytest.mark.parametrize("seed", range(3))
def test_documents_tell_what_holds_and_nothing_that_does_not(seed):
    world, steps, found = snapshots(seed)
    for state, of_step in zip(states(world, steps), found, strict=True):
        texts: dict[tuple[str, ...], list[str]] = {}
        for document in of_step.corpus.documents:
            texts.setdefault(tuple(document.id.split("/")[:2]), []).append(document.text)
        assert texts.keys() == state.keys()
        for key, value in state.items():
            assert len(texts[key]) == 3 and all(value[0] in text for text in texts[key])


@pytest.mark.parametrize("seed", range(3))
def test_a_step_brings_the_documents_that_it_changes_and_upserts_only_those(seed):
    _, steps, found = snapshots(seed)
    for step, before, after in zip(steps, found, found[1:], strict=False):
        told = {"/".join(c.key) for c in step if c.after is not None}
        assert {d.id.rpartition("/")[0] for d in after.update.documents} == told
        held = {passage.id: passage for passage in before.corpus.passages}
        new = [p for p in after.corpus.passages if held.get(p.id) != p]
        assert {p.document.rpartition("/")[0] for p in new} == told
        gone = held.keys() - {p.id for p in after.corpus.passages}
        deleted = {"/".join(c.key) for c in step if c.after is None}
        assert {held[id].document.rpartition("/")[0] for id in gone} == deleted


@pytest.mark.parametrize("seed", range(3))
def test_each_fact_is_asked_once_in_the_same_words_and_in_the_split_of_its_history(seed):
    world, steps, found = snapshots(seed)
    words: dict[str, str] = {}
    for number, (state, of_step) in enumerate(zip(states(world, steps), found, strict=True)):
        last = {c.key: n for n, step in enumerate(steps[:number], 1) for c in step}
        keys = [tuple(one.question.id.split("/")) for one in of_step.asked]
        assert len(set(keys)) == len(keys) and set(keys) == state.keys() | last.keys()
        for key, one in zip(keys, of_step.asked, strict=True):
            question = one.question
            assert words.setdefault(question.id, question.text) == question.text
            expected = (
                DELETED
                if key not in state
                else OLD
                if key not in last
                else NEW
                if last[key] == number
                else EARLIER
            )
            assert question.split == expected
            assert not set(one.past) & set(state.get(key, ()))
            if expected == DELETED:
                assert not question.passages and set(question.answers) <= set(one.past)
                assert one.others and not set(one.others) & set(one.past)
            else:
                assert question.answers == state[key] and len(question.passages) == 3
        assert of_step.corpus.training_questions == found[0].corpus.training_questions


def test_a_change_that_does_not_fit_the_state_is_refused():
    state = {("a", "x"): ("1",)}
    for changes in (
        (Change(("a", "x"), None, ("2",)),),
        (Change(("a", "x"), ("3",), ("2",)),),
        (Change(("a", "y"), ("1",), None),),
        (Change(("a", "x"), ("1",), None), Change(("a", "x"), None, ("2",))),
    ):
        with pytest.raises(ValueError, match=r"before its change|twice"):
            apply(state, changes)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"edited": 9}, "step 1 finds 6 facts to edit, not 9"),
        ({"deleted": 9}, r"step 1 finds 5 facts to delete, not 9; more --subjects"),
        ({"added": 3}, "finds 2 new subjects of biographies, not 3"),
    ],
)
def test_what_runs_out_is_named(counts, message):
    world = biographies_world(4, 2, 3, 0)
    with pytest.raises(UserError, match=message):
        draw(world, 2, **{"added": 1, "edited": 1, "deleted": 0, **counts}, seed=0)


def test_a_corpus_that_does_not_change_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"does not change. Did you mean 'factbook'"):
        open_world("factbok", 4, 1, 2, 0, None)
