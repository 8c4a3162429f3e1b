"""Stacks of layers in a parameter tree, and the numbers of the layers that lie in each.

Layers of one shape are one stack, in order:

    layers/attn/q_proj/kernel             [L, D, H]      layers 0, 1, 2 ...

Where shapes differ, a stack holds layers of one shape that are equally far apart. Its name says
which:

    layers/from5by6/attn/q_proj/kernel    [L/6, D, H]    layers 5, 11, 17 ...
"""

from __future__ import annotations

import re

_STACK = re.compile(r"^layers/from(\d+)by(\d+)/")


def name(numbers: range) -> str:
    """Names the stack of these layers: `range(5, 42, 6)` -> `"from5by6"`."""
    return f"from{numbers.start}by{numbers.step}"


def numbers(path: str, n: int) -> range:
    """Numbers of the `n` layers in the parameter at `path`.

    >>> list(numbers("layers/from5by6/attn/q_proj/kernel", 3)), list(numbers("layers/attn/q_proj/kernel", 3))
    ([5, 11, 17], [0, 1, 2])
    """
    found = _STACK.match(path)
    first, step = (int(found[1]), int(found[2])) if found else (0, 1)
    return range(first, first + step * n, step)


def common(path: str) -> str:
    """Returns the path without the name of the stack, which is the same for all layers.

    >>> common("layers/from5by6/attn/q_proj/kernel")
    'layers/attn/q_proj/kernel'
    """
    return _STACK.sub("layers/", path)


def of_layer(path: str, number: int) -> str:
    """Returns the path of one layer of the parameter at `path`.

    >>> of_layer("layers/from5by6/attn/q_proj/kernel", 11)
    'layers/11/attn/q_proj/kernel'
    """
    return common(path).replace("layers/", f"layers/{number}/", 1)
