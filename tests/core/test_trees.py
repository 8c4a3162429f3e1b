from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafjax.core import trees

names = st.text("ab.é", max_size=2)
leaves = st.integers(0, 9) | st.none() | st.just([1])
nested = st.recursive(
    leaves, lambda child: st.dictionaries(names, child, min_size=1, max_size=3), max_leaves=8
)
tree_strategy = st.dictionaries(names, nested, max_size=3)


def ordered(tree):
    """Nested lists of pairs: equal only if the order is, too."""
    return (
        [(name, ordered(child)) for name, child in tree.items()] if isinstance(tree, dict) else tree
    )


@given(tree_strategy)
def test_unflatten_inverts_flatten_in_order(tree):
    assert ordered(trees.unflatten(trees.flatten(tree))) == ordered(tree)


@given(tree_strategy, st.sets(names))
def test_combine_inverts_partition(tree, chosen):
    yes, no = trees.partition(tree, lambda path: path.split("/")[-1] in chosen)
    assert trees.flatten(yes).keys() | trees.flatten(no).keys() == trees.flatten(tree).keys()
    assert all(path.split("/")[-1] in chosen for path in trees.flatten(yes))
    assert trees.combine(yes, no) == trees.combine(no, yes) == tree


@given(tree_strategy)
def test_map_with_path_sees_each_leaf_at_its_path(tree):
    def look_up(path, leaf):
        node = tree
        for name in path.split("/"):
            node = node[name]
        assert node is leaf
        return [leaf]

    mapped = trees.map_with_path(look_up, tree)
    assert trees.flatten(mapped) == {path: [leaf] for path, leaf in trees.flatten(tree).items()}


def test_paths_that_share_a_leaf_are_refused():
    with pytest.raises(ValueError, match="'a/b' is in two"):
        trees.combine({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    with pytest.raises(ValueError, match="'a/b/c' lies below a leaf"):
        trees.combine({"a": {"b": 1}}, {"a": {"b": {"c": 3}}})
    with pytest.raises(ValueError, match="'a/b' is a leaf"):
        trees.combine({"a": {"b": {"c": 3}}}, {"a": {"b": 1}})


PARAMS = {
    "embed": {"embedding": np.zeros((7, 4), np.float16)},
    "layers": {
        "q_proj": {"kernel": np.zeros((2, 4, 6), np.float32)},
        "norm": {"scale": np.zeros((2, 4), np.int8)},
    },
    "step": np.int32(3),
}


def test_matching_finds_the_expression_anywhere_in_a_path():
    assert trees.matching(r"(q|k)_proj", PARAMS) == ["layers/q_proj/kernel"]
    assert trees.matching(r"^layers/.*(kernel|scale)$", PARAMS) == [
        "layers/q_proj/kernel",
        "layers/norm/scale",
    ]
    assert trees.matching("kernels", PARAMS) == []


def test_sizes_are_those_of_the_arrays():
    arrays = list(trees.flatten(PARAMS).values())
    assert trees.count(PARAMS) == sum(a.size for a in arrays) == 28 + 48 + 8 + 1
    assert trees.n_bytes(PARAMS) == sum(a.nbytes for a in arrays)
