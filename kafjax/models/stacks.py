"""The stacks that a decoder's layers lie in, and the blocks of stacks that one scan runs over.

Layers of one shape are one stack, as in most families. Otherwise the layers that have keys and
values, and those that share them, are a block each. A block repeats its kinds of layers: sliding,
sliding, full, sliding, sliding, full. Every place of the shortest such period is a stack, and one
scan over periods runs all stacks of the block:

    layer   0        1        2         3        4        5        block of period 3
    kind    sliding  sliding  full      sliding  sliding  full
    stack   from0by3 from1by3 from2by3  from0by3 from1by3 from2by3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kafjax.core import stacks
from kafjax.models.config import DecoderConfig, LayerShape


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one shape, `numbers` of the decoder; `name` is that of the stack, "" for the only
    one."""

    name: str
    numbers: range
    shape: LayerShape


Block = tuple[Stack, ...]


def blocks(cfg: DecoderConfig) -> tuple[Block, ...]:
    """The stacks of a decoder, together with those that they are run with, in the order of their
    layers."""
    shapes = [cfg.shape(i) for i in range(cfg.n_layers)]
    if len(set(shapes)) == 1:
        return ((Stack("", range(cfg.n_layers), shapes[0]),),)
    first_sharing = cfg.n_layers - cfg.n_sharing
    return tuple(
        _block(cfg, layers)
        for layers in (range(first_sharing), range(first_sharing, cfg.n_layers))
        if layers
    )


def _block(cfg: DecoderConfig, layers: range) -> Block:
    kinds = [(cfg.shape(i), cfg.sliding[i]) for i in layers]
    period = next(
        p
        for p in range(1, len(kinds) + 1)
        if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p)
    )
    places = [layers[first::period] for first in range(period)]
    return tuple(
        Stack(stacks.name(numbers), numbers, cfg.shape(numbers.start)) for numbers in places
    )


def joined(by_name: Mapping[str, Any]) -> Any:
    """Joins trees of stacks to one, by name; that of the only stack is the whole."""
    return by_name.get("", by_name)


def of_stack(tree: Any, name: str) -> Any:
    """A stack's part of a `joined` tree; None where it has none."""
    return tree.get(name) if tree and name else tree
