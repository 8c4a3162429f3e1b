"""Parameter trees: nested dicts of arrays, addressed by `"layers/attn/q_proj/kernel"`-style path
strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kafjax.core import patterns

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> `{path: leaf}`, in the tree's order. Anything that is not a mapping is a
    leaf."""
    flat: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, child in node.items():
            if isinstance(child, Mapping):
                walk(child, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = child

    walk(tree, "")
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten` (an empty dict inside the tree is lost). Raises `ValueError` naming a
    path that lies below another's leaf."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"'{path}' lies below a leaf")
        if name in node:
            raise ValueError(f"'{path}' is a leaf, and others lie below it")
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """Applies `function(path, leaf)` to each leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def partition(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree in two by path: (where `chosen(path)` holds, the rest). `combine` puts them
    together again."""
    flat = flatten(tree)
    yes = {path: leaf for path, leaf in flat.items() if chosen(path)}
    no = {path: leaf for path, leaf in flat.items() if path not in yes}
    return unflatten(yes), unflatten(no)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """Merges disjoint trees. Raises `ValueError` naming a path that is in two of them."""
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"'{path}' is in two of the trees to combine")
            flat[path] = leaf
    return unflatten(flat)


def matching(pattern: str, tree: Mapping[str, Any]) -> list[str]:
    """Paths in which the regular expression `pattern` is found."""
    return [path for path in flatten(tree) if patterns.search(pattern, path)]


def count(tree: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def n_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of all arrays; a leaf may hold several."""
    return sum(
        int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
        for array in jax.tree.leaves(tree)
    )
