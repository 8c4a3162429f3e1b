"""Ways to follow changes: their names, what each trains on, and an index that follows the stream."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kafjax import lora
from kafjax.core.errors import UserError
from kafjax.corpus.stream import draw, snapshot
from kafjax.corpus.worlds import biographies_world
from kafjax.lora.files import ADAPTER
from kafjax.methods.ways import WAYS, Update, check, follow, forget, way
from kafjax.retrieval import Store


@pytest.fixture(scope="module")
def snapshots():
    world = biographies_world(4, 2, 2, 0)
    steps = draw(world, 2, added=1, edited=1, deleted=1, seed=0)
    return [
        snapshot(world, steps[:n], n_documents=2, questions_per_fact=1, seed=0) for n in range(3)
    ]


@pytest.fixture
def lab(make_lab):
    return dataclasses.replace(make_lab(epochs=1)[0])


@pytest.mark.parametrize(
    ("name", "weights", "follows", "reader"),
    [
        ("base", "base", None, None),
        ("full", "full", "again", None),
        ("lora-newest", "lora", "newest", None),
        ("dora-on+hyde", "dora", "on", "hyde"),
        ("rag", "base", None, "rag"),
        ("full+rag", "full", "again", "rag"),
    ],
)
def test_a_name_says_weights_how_they_follow_and_a_reader(name, weights, follows, reader):
    found = way(name)
    assert (found.weights, found.follows, found.reader) == (weights, follows, reader)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora-onn", "unknown way 'lora-onn'. Did you mean 'lora-on'"),
        ("lora-", "unknown way"),
        ("base-on", "never trained; choose lora-on"),
        ("rag-on", "never trained; choose lora-on"),
        ("lora-on+oracle", "told the passage that answers"),
        ("lor+rag", "unknown method"),
        ("", "unknown method"),
    ],
)
def test_a_name_that_is_none_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        way(name)


def test_every_way_that_is_offered_is_one():
    assert [way(name).name for name in WAYS] == list(WAYS)


def test_going_on_keeps_what_the_step_before_has_learned_and_the_newest_does_not(lab, snapshots):
    def adapter(name: str, number: int):
        folder = lab.folder / "weights" / name / str(number) / "lora"
        return lora.load(folder / ADAPTER, lab.params)[0]

    for name in ("lora-on", "lora-newest"):
        _, whole = follow(lab, way(name), snapshots[:1], 1)
        method, step = follow(lab, way(name), snapshots[:2], 1)
        assert 0 < step.tokens < whole.tokens and step.seconds > 0
        assert step.bytes_written == whole.bytes_written > 1000
    first, on, newest = adapter("lora", 0), adapter("lora-on", 1), adapter("lora-newest", 1)

    def distance(a, b):
        return sum(float(np.square(np.asarray(a[k]["b"]) - np.asarray(b[k]["b"])).sum()) for k in a)

    assert 0 < distance(on, first) < distance(newest, first)
    forget(lab, 0)
    assert not (lab.folder / "weights" / "lora" / "0").exists()
    assert method.params is not lab.params


def test_all_weights_can_go_on_too(lab, snapshots):
    before, _ = follow(lab, way("full-on"), snapshots[:1], 1)
    after, update = follow(lab, way("full-on"), snapshots[:2], 1)
    assert after.lab.params is not lab.params and update.flops > 0
    path = ("layers", "attn", "q_proj", "kernel")
    kernels = [m.params for m in (before, after)] + [after.lab.params]
    for key in path:
        kernels = [tree[key] for tree in kernels]
    old, new, began = map(np.asarray, kernels)
    np.testing.assert_array_equal(began, old)
    assert np.abs(new - old).max() > 0


def test_an_index_follows_the_stream_and_a_step_done_twice_is_done_once(lab, snapshots):
    rag = way("rag")
    store = lab.folder / "index" / "rag" / "index" / "store"
    costs = []
    for n in (1, 2, 3):
        method, cost = follow(lab, rag, snapshots[:n], 1)
        costs.append(cost)
        wanted = {p.id: p for p in snapshots[n - 1].corpus.passages}
        assert {p.id: p for p in Store.load(store).passages} == wanted
        assert method.params is lab.params
    first, second = costs[0], costs[1]
    assert 0 < second.tokens < first.tokens and 0 < second.bytes_written
    # a start that was killed after the index was saved: the step is timed and billed as a whole
    _, again = follow(lab, rag, snapshots[:3], 1)
    assert again.tokens == costs[2].tokens and again.flops == costs[2].flops
    (hits,) = method.lab.retriever.search([snapshots[2].asked[0].question.text], 2)
    assert {hit.passage.id for hit in hits} <= {p.id for p in snapshots[2].corpus.passages}


def test_what_cannot_be_followed_is_refused_before_anything_trains(make_lab):
    with pytest.raises(UserError, match=r"pissa-on.*cannot go on from an adapter; choose lora-on"):
        check(make_lab()[0], way("pissa-on"))
    with pytest.raises(UserError, match="cannot go on"):
        check(make_lab(init="olora")[0], way("lora-on+rag"))
    with pytest.raises(UserError, match="no model '/nowhere'"):
        check(make_lab(reranker="/nowhere")[0], way("rag"))


def test_costs_add_up():
    assert Update(1, 2, 3, 4) + Update(10, 20, 30, 40) == Update(11, 22, 33, 44)
