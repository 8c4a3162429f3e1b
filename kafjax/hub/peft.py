"""Adapters in the format of PEFT (Mangrulkar et al. 2022): a folder of `adapter_config.json` and `adapter_model.safetensors`.

    ours                                               PEFT's
    "layers/attn/q_proj/kernel": {"a": [L, in, R],     base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r, in]
                                  "b": [L, R, out],                                           ... .lora_B.weight [out, r]
                                  "magnitude": [..]}                                          ... .lora_magnitude_vector [out]
    "embed/embedding": {"a": [V, R], "b": [R, D]}      base_model.model.model.embed_tokens.lora_embedding_A [r, V], .lora_embedding_B [D, r]
    "embed/embedding": {"rows": [n, D]}                base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta [n, D]
    "head/embedding": {"a": [V, R], "b": [R, D]}       base_model.model.lm_head.lora_B.weight [V, r], .lora_A.weight [r, D]
    "final_norm/scale": {"scale": [D]}                 base_model.model.model.norm.weight [D], one of modules_to_save

Names are those of the family's checkpoints (`hub.names`). PEFT and a `Spec` say in different ways what is adapted and by how much, so
either is resolved to the rank and alpha of every module (`hub.peft_config`), and from there the other is written. The head of a tied
model is a module of its own there: what a tied embedding has is written for both, and must be the same of both to be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.rundir import new_folder, read_json, write_atomic, write_json
from kafjax.hub import joined, peft_config, safetensors_in
from kafjax.hub.names import TABLES, Part, Table
from kafjax.hub.peft_config import Names, Resolved
from kafjax.lora.transform import check
from kafjax.models import Decoder, Encoder

CONFIG, STEM = "adapter_config.json", "adapter_model"
_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = "embed/embedding", "head/embedding"
_TIED_HEAD = "lm_head"


class _Place(NamedTuple):
    """Where a tensor of PEFT's lies in an adapter of ours: all of it, cut to `shape`, transposed or not."""

    path: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    transpose: bool


def save_peft(
    folder: Path | str, adapters: lora.Adapters, spec: lora.Spec, model: Decoder | Encoder, params: trees.Tree, *, base_name: str = ""
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, folder)` loads, whole or not at all.

    Args:
      folder: must not exist, or be empty.
      params: the base; only shapes are read.
      base_name: what transformers calls the base; kept for those who load the adapter.

    Raises:
      UserError: the folder is taken, the adapter does not fit the base, holds NaN, or is one that PEFT has no form for.
    """
    if spec.changes_base:
        raise UserError(f"an adapter with init={spec.init!r} stands beside what it left of the base; save what `lora.plain` makes of it")
    check(params, adapters, spec)
    lora.abstract(spec, params)
    base = _Base.of(model, params)
    described = base.described(spec)
    base.refuse_dora(described, spec)
    fields = {"use_rslora": spec.rslora, "use_dora": spec.dora, "lora_dropout": spec.dropout, "ensure_weight_tying": base.ties(spec)}
    tensors = {name: _taken(adapters, place) for name, place in base.places(described, dora=spec.dora)}
    described, tensors = joined.join(described, tensors, base.joined, _PREFIX, rslora=spec.rslora)
    config = peft_config.written(described, base.names, r=spec.rank, lora_alpha=spec.alpha, **fields)
    config["task_type"] = "CAUSAL_LM" if isinstance(model, Decoder) else "FEATURE_EXTRACTION"
    config["base_model_name_or_path"] = base_name or None
    _check_finite(tensors.items(), "the adapter to be saved")
    with new_folder(Path(folder)) as made:
        write_json(made / CONFIG, config)
        write_atomic(made / f"{STEM}.safetensors", safetensors.numpy.save(tensors, {"format": "pt"}))


def load_peft(folder: Path | str, model: Decoder | Encoder, params: trees.Tree) -> tuple[lora.Adapters, lora.Spec]:
    """Reads what PEFT or `save_peft` wrote: `adapters, spec = load_peft(folder, model, params)`.

    An adapter that began as PiSSA or OLoRA, and so stands beside another base, becomes an ordinary one of twice the rank: what it began
    as is computed again from the base.

    Args:
      folder: of `adapter_config.json` and `adapter_model.safetensors`, or shards of it with an index.
      params: the base it is meant for; only shapes are read, so abstract ones will do, but for PiSSA and OLoRA.

    Raises:
      UserError: a file is missing, damaged or a pickle; a setting that is not computed; NaN; an adapter for another base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter of PEFT in {folder}: it has no {CONFIG}")
    stored = _read(folder)
    base, given_config = _Base.of(model, params).named_as_in(stored), read_json(folder / CONFIG)
    try:
        config = peft_config.completed(given_config)
        # A Spec knows what ranks, alphas and patterns can be.
        fields = {"rslora": config["use_rslora"], "dora": config["use_dora"], "dropout": config["lora_dropout"]}
        patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern")}
        given = lora.Spec(rank=config["r"], alpha=config["lora_alpha"], **patterns, **fields)
        described, stored = joined.split(peft_config.resolved(config, base.names), stored, base.joined, _PREFIX, STEM)
        if base.joined and peft_config.INITS[config["init_lora_weights"]] != "lora":
            raise UserError(f"init_lora_weights={config['init_lora_weights']!r} of joined modules is not supported")
        spec = base.spec(described, given)
        lora.abstract(spec, params)
        base.refuse_dora(described, spec)
        if base.ties(spec) and not config["ensure_weight_tying"]:
            raise UserError("trains the embedding apart from the head that is tied to it (ensure_weight_tying is false)")
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    adapters = _filled(
        base.without_copies(stored, folder), dict(base.places(described, dora=spec.dora)), lora.abstract(spec, params), folder
    )
    init = peft_config.INITS[config["init_lora_weights"]]
    if init == "lora":
        return adapters, spec
    if base.is_abstract:
        raise UserError(f"{folder / CONFIG}: init_lora_weights={init!r} took something out of the base, whose values are needed")
    began = dataclasses.replace(spec, init=init)
    return lora.plain(params, adapters, _beginning(adapters, began, params), began)


def _beginning(adapters: lora.Adapters, spec: lora.Spec, params: trees.Tree) -> lora.Adapters:
    """What PEFT began with from the same base: exact singular vectors (PiSSA), or the QR decomposition (OLoRA)."""
    leaves, ranks, scales = trees.flatten(params), lora.ranks(spec, params), lora.scales(spec, params)
    began = {path: {name: np.array(part) for name, part in parts.items()} for path, parts in adapters.items()}

    def of_layer(w: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        if spec.init == "olora":
            q = np.linalg.qr(w.T)[0][:, :rank]
            return w @ q, q.T
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * (s[:rank] / scale), vt[:rank]

    for path, of_path in ranks.items():
        for layer in np.ndindex(of_path.shape):
            if rank := of_path[layer]:
                a, b = of_layer(np.asarray(leaves[path][layer], np.float32), rank, scales[path][layer])
                began[path]["a"][layer][:, :rank], began[path]["b"][layer][:rank] = a, b
    return jax.tree.map(jnp.asarray, began)


@dataclasses.dataclass(frozen=True)
class _Base:
    """The model that an adapter is for: `where[name] = (path, layer)` of each tensor, by its name in the torch model.

    Tensors that are `joined` there are in `where` by their parts, under the names of `Table.tensors`.

    `transposed` are the paths of parameters that lie the other way round there.
    """

    params: trees.Tree
    tied: bool
    where: dict[str, tuple[str, int | None]]
    transposed: frozenset[str]
    table: Table
    joined: dict[str, tuple[Part, ...]]

    @classmethod
    def of(cls, model: Decoder | Encoder, params: trees.Tree) -> _Base:
        table = TABLES[model.config.family]
        entries = table.tensors(params)
        where = {name: (entry.path, layer) for name, (entry, layer) in entries.items()}
        transposed = frozenset(entry.path for entry, _ in entries.values() if entry.transpose)
        return cls(params, isinstance(model, Decoder) and model.config.tied, where, transposed, table, table.joined(params))

    def named_as_in(self, stored: Iterable[str]) -> _Base:
        """The same under the names of an adapter's file, whose writer may have seen the base as a part of a larger one."""
        swaps = {}
        for name in stored:
            for pattern, replacement in self.table.renamed:
                if found := re.match(pattern, name.removeprefix(_PREFIX)):
                    swaps[replacement] = found[0]
        where = self.where
        for ours, theirs in swaps.items():
            where = {theirs + name.removeprefix(ours) if name.startswith(ours) else name: place for name, place in where.items()}
        return dataclasses.replace(self, where=where)

    @property
    def modules(self) -> list[str]:
        """Those that can have an adapter."""
        return [name.removesuffix(".weight") for name, (path, _) in self.where.items() if path.endswith(("/kernel", "/embedding"))]

    @property
    def embedding(self) -> str:
        return next((name.removesuffix(".weight") for name, (path, _) in self.where.items() if path == _EMBEDDING), "")

    @property
    def names(self) -> Names:
        wholes = {part.name: whole for whole, parts in self.joined.items() for part in parts}
        modules = dict.fromkeys(wholes.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in self.modules)
        tensors = dict.fromkeys(wholes.get(name, name) for name in self.where)
        return Names(list(modules), list(tensors), self.embedding, _TIED_HEAD if self.tied else "")

    @property
    def is_abstract(self) -> bool:
        return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params))

    def ties(self, spec: lora.Spec) -> bool:
        """Whether the adapter changes an embedding that is the head as well."""
        return self.tied and (_EMBEDDING in lora.ranks(spec, self.params) or _EMBEDDING in lora.trained(spec, self.params))

    def refuse_dora(self, described: Resolved, spec: lora.Spec) -> None:
        heads = {f"{_TIED_HEAD}.weight"} | {
            name for name, (path, _) in self.where.items() if path == _HEAD or (self.tied and path == _EMBEDDING)
        }
        if spec.dora and (found := [module for module in described.ranks if f"{module}.weight" in heads]):
            raise UserError(f"DoRA beside '{found[0]}' is not supported: a head has a length per token in PEFT and per dimension here")

    def without_copies(self, stored: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
        """`stored` without the copies of the base's own tables that PEFT keeps beside an adapter of them.

        Raises `UserError` if one is of another base (where this one is not abstract, by its numbers).
        """
        leaves, rest = trees.flatten(self.params), {}
        for name, array in stored.items():
            module = name.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
            path = _EMBEDDING if self.tied and module == _TIED_HEAD else self.where.get(f"{module}.weight", ("", None))[0]
            if not name.endswith(".base_layer.weight") or not path.endswith("/embedding"):
                rest[name] = array
            elif array.shape != (wanted := leaves[path].shape):
                raise UserError(f"{folder}: tensor '{name}' has shape {list(array.shape)}, this base has {list(wanted)}")
            elif not self.is_abstract and not np.allclose(array, np.asarray(leaves[path], np.float32), rtol=2**-7, atol=1e-6):  # bfloat16's
                raise UserError(f"{folder}: tensor '{name}' is not the table of this base; was it trained beside another?")
        return rest

    def described(self, spec: lora.Spec) -> Resolved:
        ranks, alphas, trained = lora.ranks(spec, self.params), lora.alphas(spec, self.params), lora.trained(spec, self.params)
        if unnamed := sorted({*ranks, *trained} - {path for path, _ in self.where.values()}):
            raise UserError(f"'{unnamed[0]}' is trained, for which PEFT has no form")
        own = {}
        for module in self.modules:
            path, layer = self.where[f"{module}.weight"]
            if path in ranks and (rank := _at(ranks[path], layer)):
                own[module] = (int(rank), float(_at(alphas[path], layer)))
        in_full = frozenset(name for name, (path, _) in self.where.items() if path in trained)
        return Resolved(
            {name: rank for name, (rank, _) in own.items()}, {name: alpha for name, (_, alpha) in own.items()}, in_full, spec.token_rows
        )

    def spec(self, described: Resolved, given: lora.Spec) -> lora.Spec:
        """`given` with the targets, patterns and what is trained in full that give just what is `described`."""
        leaves = trees.flatten(self.params)
        ranks: dict[str, np.ndarray] = {}
        alphas: dict[str, np.ndarray] = {}
        for module, rank in described.ranks.items():
            path, layer = self.where[f"{module}.weight"]
            stacked = leaves[path].shape[:-2]
            ranks.setdefault(path, np.zeros(stacked, int))[() if layer is None else layer] = rank
            alphas.setdefault(path, np.zeros(stacked))[() if layer is None else layer] = described.alphas[module]
        trained = {self.where[name][0] for name in described.trained}
        if halves := [name for name, (path, _) in self.where.items() if path in trained and name not in described.trained]:
            raise UserError(f"modules_to_save takes some layers and not '{halves[0]}': a parameter is trained in all layers or none")
        in_full = f"^({'|'.join(sorted(trained))})$" if trained else ""
        fields = {"rslora": given.rslora, "dora": given.dora, "dropout": given.dropout}
        return lora.explicit(ranks, alphas, given.rank, given.alpha, trained=in_full, token_rows=described.token_rows, **fields)

    def places(self, described: Resolved, *, dora: bool) -> Iterator[tuple[str, _Place]]:
        """`(name, place)` of each tensor of the adapter that is `described`."""
        leaves = trees.flatten(self.params)
        for module, rank in described.ranks.items():
            path, layer = self.where[f"{module}.weight"]
            n_in, n_out = leaves[path].shape[-2:]
            a, b = _Place(path, layer, "a", (rank, n_in), True), _Place(path, layer, "b", (n_out, rank), True)
            if path == _HEAD:
                yield from self._of_head(module, a, b)
            elif path.endswith("/embedding"):
                yield from ((f"{_PREFIX}{module}.lora_embedding_A", a), (f"{_PREFIX}{module}.lora_embedding_B", b))
                if self.tied and path == _EMBEDDING:
                    yield from self._of_head(_TIED_HEAD, a, b)
            else:
                yield from ((f"{_PREFIX}{module}.lora_A.weight", a), (f"{_PREFIX}{module}.lora_B.weight", b))
            if dora:
                yield f"{_PREFIX}{module}.lora_magnitude_vector", _Place(path, layer, "magnitude", (n_out,), False)
        for name in sorted(described.trained):
            path, layer = self.where[name]
            shape = leaves[path].shape[0 if layer is None else 1 :]
            transpose = path in self.transposed
            place = _Place(path, layer, path.rpartition("/")[2], shape[::-1] if transpose else shape, transpose)
            yield f"{_PREFIX}{name}", place
            if self.tied and path == _EMBEDDING:
                yield f"{_PREFIX}{_TIED_HEAD}.weight", place
        if n := len(described.token_rows):
            name = f"{_PREFIX}{self.embedding}.token_adapter.trainable_tokens_delta"
            yield name, _Place(_EMBEDDING, None, "rows", (n, leaves[_EMBEDDING].shape[1]), False)

    def _of_head(self, module: str, a: _Place, b: _Place) -> Iterator[tuple[str, _Place]]:
        """A head is a linear layer there, with the tokens as its outputs."""
        yield f"{_PREFIX}{module}.lora_A.weight", b._replace(shape=b.shape[::-1], transpose=False)
        yield f"{_PREFIX}{module}.lora_B.weight", a._replace(shape=a.shape[::-1], transpose=False)


def _at(array: Any, layer: int | None) -> Any:
    return array if layer is None else array[layer]


def _read(folder: Path) -> dict[str, np.ndarray]:
    has_safetensors = any(folder.glob(f"{STEM}*.safetensors*"))
    if not has_safetensors and (pickles := sorted(folder.glob(f"{STEM}*.bin"))):
        raise UserError(f"{pickles[0]} is a pickle, which can run code: it is not opened. Save the adapter as safetensors")
    stored = {name: np.asarray(tensor[...], np.float32) for name, tensor in safetensors_in.read_tensors(folder, STEM)}
    _check_finite(stored.items(), str(folder))
    return stored


def _check_finite(tensors: Iterable[tuple[str, np.ndarray]], source: str) -> None:
    for name, tensor in tensors:
        if not np.isfinite(tensor).all():
            raise UserError(f"{source}: tensor '{name}' holds NaN or infinity")


def _taken(adapters: lora.Adapters, place: _Place) -> np.ndarray:
    array = np.asarray(_at(adapters[place.path][place.part], place.layer), np.float32)
    return np.ascontiguousarray((array.T if place.transpose else array)[tuple(slice(n) for n in place.shape)])


def _filled(stored: dict[str, np.ndarray], places: dict[str, _Place], shapes: dict[str, Any], folder: Path) -> lora.Adapters:
    """An adapter of these shapes, each tensor in its place. Raises `UserError` naming one that is missing, misshapen or has no place."""
    # Where a layer has no adapter nothing is read: zero factors, and lengths that are never used.
    fresh = lambda name, leaf: np.full(leaf.shape, name == "magnitude", np.float32)  # noqa: E731
    adapters = {path: {name: fresh(name, leaf) for name, leaf in parts.items()} for path, parts in shapes.items()}
    filled: dict[Any, str] = {}
    if extra := [name for name in stored if name not in places]:
        raise UserError(f"{folder}: tensor '{extra[0]}' has no place in the adapter that {CONFIG} describes for this base")
    for name, place in places.items():
        if name not in stored:
            raise UserError(f"{folder}: tensor '{name}' is missing, which {CONFIG} asks for with this base")
        if (shape := stored[name].shape) != place.shape:
            raise UserError(f"{folder}: tensor '{name}' has shape {list(shape)}, this base and {CONFIG} ask for {list(place.shape)}")
        array = _at(adapters[place.path][place.part], place.layer)
        view = (array.T if place.transpose else array)[tuple(slice(n) for n in place.shape)]
        if (twin := filled.setdefault(place[:3], name)) != name and not np.array_equal(view, stored[name]):
            raise UserError(f"{folder}: tensor '{name}' is not as '{twin}', but the head of this base is tied to its embedding")
        view[...] = stored[name]
    return jax.tree.map(jnp.asarray, adapters)
