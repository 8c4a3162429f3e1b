"""The base model of a PEFT adapter: the place of each tensor of the adapter, by the names of the
torch model."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub.names import TABLES, Part, Table, in_multimodal
from kafjax.hub.peft_config import Names, Resolved
from kafjax.models import Decoder, Encoder

PREFIX = "base_model.model."
EMBEDDING, HEAD = "embed/embedding", "head/embedding"
DELTA = "token_adapter.trainable_tokens_delta"
_TENSOR = re.compile(
    r"(.+?)\.((?:lora_[^.]+|base_layer|original_module|modules_to_save|token_adapter)(?:\..+)?|weight|bias)"
)


class Place(NamedTuple):
    """Place of a PEFT tensor in an adapter of ours: all of it, cut to `shape`, transposed or
    not."""

    path: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    transpose: bool


def split(name: str) -> tuple[str, str]:
    """Splits the name of a tensor in an adapter's file into module and part: `("lm_head",
    "lora_A.weight")`."""
    found = _TENSOR.fullmatch(name.removeprefix(PREFIX))
    return (found[1], found[2]) if found else (name, "")


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that an adapter is for: `where[name] = (path, layer)` of each tensor, by its name
    in the torch model.

    Attributes:
      head: the module that has the embedding's weight as well; "" if there is none.
      transposed: paths of parameters that lie the other way round there.
      joined: tensors there that hold several of ours; those stand in `where` by their parts, under
        the names of `Table.tensors`.
      beside: tensors of a larger model around this one.
    """

    params: trees.Tree
    head: str
    where: dict[str, tuple[str, int | None]]
    transposed: frozenset[str]
    table: Table
    joined: Mapping[str, tuple[Part, ...]]
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Decoder | Encoder, params: trees.Tree) -> Base:
        """Describes the base by the names of a model that is not part of a larger one."""
        table = TABLES[model.config.family]
        entries = table.tensors(params)
        where = {name: (entry.path, layer) for name, (entry, layer) in entries.items()}
        transposed = frozenset(entry.path for entry, _ in entries.values() if entry.transpose)
        is_tied = isinstance(model, Decoder) and model.config.tied
        return cls(
            params, "lm_head" if is_tied else "", where, transposed, table, table.joined(params)
        )

    def in_multimodal(self) -> Base:
        """Returns the base under the names that it has as the text part of a multimodal model."""
        return dataclasses.replace(
            self, where={in_multimodal(name): place for name, place in self.where.items()}
        )

    def named_as_in(self, stored: Iterable[str]) -> Base:
        """Returns the base under the names of an adapter's file, whose writer may have seen it as a
        part of a larger model."""
        swaps, beside = {}, []
        for name in stored:
            for pattern, replacement in self.table.renamed:
                if found := re.match(pattern, name.removeprefix(PREFIX)):
                    swaps[replacement] = found[0]
            if self.is_beside(name):
                beside.append(f"{split(name)[0].removeprefix(PREFIX)}.weight")

        def renamed(name: str) -> str:
            ours = next((ours for ours in swaps if name.startswith(ours)), None)
            return name if ours is None else swaps[ours] + name.removeprefix(ours)

        head = renamed(f"{self.head}.weight").removesuffix(".weight") if self.head else ""
        where = {renamed(name): place for name, place in self.where.items()}
        return dataclasses.replace(self, head=head, where=where, beside=tuple(beside))

    def is_beside(self, name: str) -> bool:
        """True if a tensor in an adapter's file belongs to a module around the base, such as a
        vision tower."""
        tensors = (
            self.table.canonical(tensor)
            for tensor in (name.removeprefix(PREFIX), f"{split(name)[0]}.weight")
        )
        return any(
            self.table.unused.fullmatch(tensor) and tensor != "lm_head.weight" for tensor in tensors
        )

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        return trees.flatten(self.params)

    @property
    def modules(self) -> list[str]:
        """Lists the modules that can have an adapter."""
        return [
            name.removesuffix(".weight")
            for name, (path, _) in self.where.items()
            if path.endswith(("/kernel", "/embedding"))
        ]

    @property
    def embedding(self) -> str:
        return next(
            (
                name.removesuffix(".weight")
                for name, (path, _) in self.where.items()
                if path == EMBEDDING
            ),
            "",
        )

    @property
    def names(self) -> Names:
        wholes = {part.name: whole for whole, parts in self.joined.items() for part in parts}
        modules = dict.fromkeys(
            wholes.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
            for name in self.modules
        )
        tensors = dict.fromkeys(wholes.get(name, name) for name in self.where)
        return Names(list(modules), list(tensors), self.embedding, self.head, self.beside)

    @property
    def is_abstract(self) -> bool:
        return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params))

    def table_of(self, module: str) -> str:
        """The path of the embedding table that a module has; "" if it has none."""
        path = (
            EMBEDDING
            if self.head and module == self.head
            else self.where.get(f"{module}.weight", ("", None))[0]
        )
        return path if path.endswith("/embedding") else ""

    def ties(self, spec: lora.Spec) -> bool:
        """True if the adapter changes an embedding that is also the head."""
        return bool(self.head) and (
            EMBEDDING in lora.ranks(spec, self.params)
            or EMBEDDING in lora.trained(spec, self.params)
        )

    def leaves_head_behind(self, described: Resolved, stored: Iterable[str]) -> bool:
        """True if an adapter changes an embedding but not the head that is tied to it."""
        changed = {
            self.where[name][0]
            for name in (*described.trained, *(f"{module}.weight" for module in described.ranks))
        }
        return (
            bool(self.head)
            and EMBEDDING in changed
            and not any(split(name)[0] == self.head for name in stored)
        )

    def refuse_dora(self, described: Resolved, spec: lora.Spec) -> None:
        """Raises `UserError` for DoRA beside a head."""
        heads = {f"{self.head}.weight"} | {
            name
            for name, (path, _) in self.where.items()
            if path == HEAD or (self.head and path == EMBEDDING)
        }
        if spec.dora and (
            found := [module for module in described.ranks if f"{module}.weight" in heads]
        ):
            raise UserError(
                f"DoRA beside '{found[0]}' is not supported: a head has a length per token in PEFT and per dimension here"
            )

    def described(self, spec: lora.Spec) -> Resolved:
        """Resolves ranks, alphas and the tensors that are trained in full, by the names of the
        torch model."""
        ranks, alphas, trained = (
            lora.ranks(spec, self.params),
            lora.alphas(spec, self.params),
            lora.trained(spec, self.params),
        )
        if unnamed := sorted({*ranks, *trained} - {path for path, _ in self.where.values()}):
            raise UserError(f"'{unnamed[0]}' is trained, for which PEFT has no form")
        own = {}
        for module in self.modules:
            path, layer = self.where[f"{module}.weight"]
            if path in ranks and (rank := at(ranks[path], layer)):
                own[module] = (int(rank), float(at(alphas[path], layer)))
        in_full = frozenset(name for name, (path, _) in self.where.items() if path in trained)
        return Resolved(
            {name: rank for name, (rank, _) in own.items()},
            {name: alpha for name, (_, alpha) in own.items()},
            in_full,
            spec.token_rows,
        )

    def spec(self, described: Resolved, given: lora.Spec) -> lora.Spec:
        """Returns `given` with the targets, patterns and fully trained parameters that resolve to
        `described`.

        A parameter that is trained in some layers is trained in all here: the others keep the
        values of the base. Raises `UserError` if those are not at hand.
        """
        ranks: dict[str, np.ndarray] = {}
        alphas: dict[str, np.ndarray] = {}
        for module, rank in described.ranks.items():
            path, layer = self.where[f"{module}.weight"]
            stacked = self.leaves[path].shape[:-2]
            ranks.setdefault(path, np.zeros(stacked, int))[() if layer is None else layer] = rank
            alphas.setdefault(path, np.zeros(stacked))[() if layer is None else layer] = (
                described.alphas[module]
            )
        trained = {self.where[name][0] for name in described.trained}
        halves = [
            name
            for name, (path, _) in self.where.items()
            if path in trained and name not in described.trained
        ]
        if halves and self.is_abstract:
            raise UserError(
                f"takes some layers in full and not '{halves[0]}', for which the values of the base are needed"
            )
        in_full = f"^({'|'.join(sorted(trained))})$" if trained else ""
        fields = {"rslora": given.rslora, "dora": given.dora, "dropout": given.dropout}
        return lora.explicit(
            ranks,
            alphas,
            given.rank,
            given.alpha,
            trained=in_full,
            token_rows=described.token_rows,
            **fields,
        )

    def places(self, described: Resolved, *, dora: bool) -> Iterator[tuple[str, Place]]:
        """`(name, place)` of each tensor of the adapter that is `described`."""
        for module, rank in described.ranks.items():
            path, layer = self.where[f"{module}.weight"]
            n_in, n_out = self.leaves[path].shape[-2:]
            a, b = (
                Place(path, layer, "a", (rank, n_in), True),
                Place(path, layer, "b", (n_out, rank), True),
            )
            if path == HEAD:
                yield from _of_head(module, a, b)
            elif path.endswith("/embedding"):
                yield from (
                    (f"{PREFIX}{module}.lora_embedding_A", a),
                    (f"{PREFIX}{module}.lora_embedding_B", b),
                )
                if self.head and path == EMBEDDING:
                    yield from _of_head(self.head, a, b)
            else:
                yield from (
                    (f"{PREFIX}{module}.lora_A.weight", a),
                    (f"{PREFIX}{module}.lora_B.weight", b),
                )
            if dora:
                yield (
                    f"{PREFIX}{module}.lora_magnitude_vector",
                    Place(path, layer, "magnitude", (n_out,), False),
                )
        for name in sorted(described.trained):
            path, layer = self.where[name]
            shape = self.leaves[path].shape[0 if layer is None else 1 :]
            transpose = path in self.transposed
            place = Place(
                path, layer, path.rpartition("/")[2], shape[::-1] if transpose else shape, transpose
            )
            module, _, part = name.rpartition(".")
            yield (
                f"{PREFIX}{module}.base_layer.{part}"
                if module in described.ranks
                else f"{PREFIX}{name}",
                place,
            )
            if self.head and path == EMBEDDING:
                yield f"{PREFIX}{self.head}.weight", place
        if n := len(described.token_rows):
            yield (
                f"{PREFIX}{self.embedding}.{DELTA}",
                Place(EMBEDDING, None, "rows", (n, self.leaves[EMBEDDING].shape[1]), False),
            )


def at(array: Any, layer: int | None) -> Any:
    """A layer of a stacked parameter; all of one that is not stacked."""
    return array if layer is None else array[layer]


def _of_head(module: str, a: Place, b: Place) -> Iterator[tuple[str, Place]]:
    """Place of a part of the head, which is a linear layer in torch, with the tokens as its
    outputs."""
    yield f"{PREFIX}{module}.lora_A.weight", b._replace(shape=b.shape[::-1], transpose=False)
    yield f"{PREFIX}{module}.lora_B.weight", a._replace(shape=a.shape[::-1], transpose=False)
