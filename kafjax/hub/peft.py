"""Adapters in the format of PEFT (Mangrulkar et al. 2022): a folder of `adapter_config.json` and
`adapter_model.safetensors`.

    hub.save_peft("my-adapter", adapters, spec, model, params, base_name="google/gemma-3-270m")
    adapters, spec = hub.load_peft("my-adapter", model, params)

    ours                                               PEFT's
    "layers/attn/q_proj/kernel": {"a": [L, in, R],     base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r, in]
                                  "b": [L, R, out],                                           ... .lora_B.weight [out, r]
                                  "magnitude": [..]}                                          ... .lora_magnitude_vector [out]
    "embed/embedding": {"a": [V, R], "b": [R, D]}      base_model.model.model.embed_tokens.lora_embedding_A [r, V], .lora_embedding_B [D, r]
    "embed/embedding": {"rows": [n, D]}                base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta [n, D]
    "head/embedding": {"a": [V, R], "b": [R, D]}       base_model.model.lm_head.lora_B.weight [V, r], .lora_A.weight [r, D]
    "final_norm/scale": {"scale": [D]}                 base_model.model.model.norm.weight [D], one of modules_to_save

Names are those of the family's checkpoints (`hub.names`), or of the multimodal model that the base
is the text part of. PEFT and a `Spec` describe targets and ranks differently, so each is resolved
to the rank and alpha of every module (`hub.peft_config`) before the other is written. In PEFT, the
head of a tied model is a module of its own. An adapter of a tied embedding is therefore written for
both modules, and must be the same for both to be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from kafjax import lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.rundir import new_folder, read_json, write_atomic, write_json
from kafjax.hub import joined, peft_config, safetensors_in
from kafjax.hub.peft_base import PREFIX, Base, Place, at, split
from kafjax.hub.peft_config import UNTIED, Resolved
from kafjax.hub.peft_copies import without_copies
from kafjax.hub.peft_settings import INITS, completed
from kafjax.lora.files import check_finite
from kafjax.lora.transform import check_adapters
from kafjax.models import Decoder, Encoder

CONFIG, STEM = "adapter_config.json", "adapter_model"
_AROUND, _POOLER = r".*(vision|audio|multi_modal)\w*\..*", r"(.*\.)?pooler\.dense"


def save_peft(
    folder: Path | str,
    adapters: lora.Adapters,
    spec: lora.Spec,
    model: Decoder | Encoder,
    params: trees.Tree,
    *,
    base_name: str = "",
    card: str = "",
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, folder)` loads, whole or not at
    all.

    Args:
      folder: must not exist, or be empty.
      params: the base; only shapes are read.
      base_name: what transformers calls the base; kept for those who load the adapter.
      card: text of README.md, the model card; none is written if empty.

    Raises:
      UserError: the folder is taken, the adapter does not fit the base, holds NaN, or is one that
        PEFT has no form for.
    """
    if spec.changes_base:
        raise UserError(
            f"an adapter with init={spec.init!r} stands beside what it left of the base; save what `lora.plain` makes of it"
        )
    check_adapters(params, adapters, spec)
    base = Base.of(model, params)
    if isinstance(model, Decoder) and model.config.multimodal:
        base = base.in_multimodal()
    described = base.described(spec)
    base.refuse_dora(described, spec)
    fields = {
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "lora_dropout": spec.dropout,
        "ensure_weight_tying": base.ties(spec),
    }
    excluded = _excluded(model, described)
    tensors = {
        name: _taken(adapters, place) for name, place in base.places(described, dora=spec.dora)
    }
    described, tensors = joined.join(described, tensors, base.joined, PREFIX, rslora=spec.rslora)
    config = peft_config.written(
        described, base.names, r=spec.rank, lora_alpha=spec.alpha, excluded=excluded, **fields
    )
    config["task_type"] = "CAUSAL_LM" if isinstance(model, Decoder) else "FEATURE_EXTRACTION"
    config["base_model_name_or_path"] = base_name or None
    check_finite(tensors, "the adapter to be saved")
    with new_folder(Path(folder)) as made:
        if card:
            (made / "README.md").write_text(card, encoding="utf-8")
        write_json(made / CONFIG, config)
        write_atomic(
            made / f"{STEM}.safetensors", safetensors.numpy.save(tensors, {"format": "pt"})
        )


def _excluded(model: Decoder | Encoder, described: Resolved) -> str:
    """Returns a regular expression for modules of the torch model that short names would match
    although they are not adapted."""
    if isinstance(model, Decoder):
        return _AROUND if model.config.multimodal else ""
    return (
        _POOLER if any(".dense" in name for name in (*described.ranks, *described.trained)) else ""
    )


def load_peft(
    folder: Path | str, model: Decoder | Encoder, params: trees.Tree
) -> tuple[lora.Adapters, lora.Spec]:
    """Reads what PEFT or `save_peft` wrote: `adapters, spec = load_peft(folder, model, params)`.

    An adapter that was initialised by PiSSA or OLoRA belongs to a residual base. It is converted to
    an ordinary one of twice the rank: its initial value is computed again from the base.

    Args:
      folder: of `adapter_config.json` and `adapter_model.safetensors`, or shards of it with an
        index.
      params: the base it is meant for. Abstract ones will do where its values are not needed: those
        of PiSSA, OLoRA and of layers beside some that are trained in full. Copies of the base's
        tables are then compared by shape alone.

    Raises:
      UserError: a file is missing, damaged or a pickle; a setting that is not computed; NaN; an
        adapter for another base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter of PEFT in {folder}: it has no {CONFIG}")
    stored = _read(folder)
    base, given_config = Base.of(model, params).named_as_in(stored), read_json(folder / CONFIG)
    with _named(folder / CONFIG):
        config = completed(given_config)
        # A Spec knows what ranks, alphas and patterns can be.
        fields = {
            "rslora": config["use_rslora"],
            "dora": config["use_dora"],
            "dropout": config["lora_dropout"],
        }
        patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern")}
        given = lora.Spec(rank=config["r"], alpha=config["lora_alpha"], **patterns, **fields)
        described, stored = joined.split(
            peft_config.resolved(config, base.names), stored, base.joined, PREFIX, STEM
        )
        if base.joined and INITS.get(config["init_lora_weights"], "lora") != "lora":
            raise UserError(
                f"init_lora_weights={config['init_lora_weights']!r} of joined modules is not supported"
            )
        base.refuse_dora(described, given)
        if not config["ensure_weight_tying"] and base.leaves_head_behind(described, stored):
            raise UserError(
                f"trains the embedding and not the head (ensure_weight_tying is false); {UNTIED}"
            )
    stored, described = without_copies(stored, described, base, folder)
    with _named(folder / CONFIG):
        spec = base.spec(described, given)
        shapes = lora.shapes(spec, params)
        began = dataclasses.replace(spec, init=INITS.get(config["init_lora_weights"], "lora"))
        if began.changes_base:
            # no kernel has more singular vectors than its smaller side
            lora.abstract(began, params)
            if base.is_abstract:
                raise UserError(
                    f"init_lora_weights={began.init!r} took something out of the base, whose values are needed"
                )
    adapters = _filled(stored, _places(base, described, stored, spec), shapes, base, folder)
    return (
        lora.plain(params, adapters, _beginning(adapters, began, params), began)
        if began.changes_base
        else (adapters, spec)
    )


@contextlib.contextmanager
def _named(file: Path) -> Generator[None]:
    """Prefixes errors with the file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _places(
    base: Base, described: Resolved, stored: Mapping[str, np.ndarray], spec: lora.Spec
) -> dict[str, Place]:
    """Returns the place of each tensor. A tensor that a tied head shares with the embedding need
    not be stored twice."""
    places = base.places(described, dora=spec.dora)
    return {
        name: place
        for name, place in places
        if name in stored or not base.head or split(name)[0] != base.head
    }


def _beginning(adapters: lora.Adapters, spec: lora.Spec, params: trees.Tree) -> lora.Adapters:
    """Computes PEFT's initial adapter for a base: exact singular vectors (PiSSA), or the QR
    decomposition (OLoRA)."""
    leaves, ranks, scales = (
        trees.flatten(params),
        lora.ranks(spec, params),
        lora.scales(spec, params),
    )
    began = {
        path: {name: np.array(part) for name, part in parts.items()}
        for path, parts in adapters.items()
    }

    def of_layer(w: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        if spec.init == "olora":
            q = np.linalg.qr(w.T)[0][:, :rank]
            return w @ q, q.T
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * (s[:rank] / scale), vt[:rank]

    for path, of_path in ranks.items():
        for layer in np.ndindex(of_path.shape):
            if rank := of_path[layer]:
                a, b = of_layer(
                    np.asarray(leaves[path][layer], np.float32), rank, scales[path][layer]
                )
                began[path]["a"][layer][:, :rank], began[path]["b"][layer][:rank] = a, b
    return jax.tree.map(jnp.asarray, began)


def _read(folder: Path) -> dict[str, np.ndarray]:
    has_safetensors = any(folder.glob(f"{STEM}*.safetensors*"))
    if not has_safetensors and (pickles := sorted(folder.glob(f"{STEM}*.bin"))):
        raise UserError(
            f"{pickles[0]} is a pickle, which can run code: it is not opened. Save the adapter as safetensors"
        )
    stored = {
        name: np.asarray(tensor[...]) for name, tensor in safetensors_in.read_tensors(folder, STEM)
    }
    check_finite(stored, str(folder))
    return stored


def _taken(adapters: lora.Adapters, place: Place) -> np.ndarray:
    array = np.asarray(at(adapters[place.path][place.part], place.layer), np.float32)
    return np.ascontiguousarray(
        (array.T if place.transpose else array)[tuple(slice(n) for n in place.shape)]
    )


def _filled(
    stored: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    shapes: Mapping[str, Any],
    base: Base,
    folder: Path,
) -> lora.Adapters:
    """Fills an adapter of these shapes. Raises `UserError` naming a tensor that is missing,
    misshapen or has no place."""
    if extra := [name for name in stored if name not in places]:
        raise UserError(
            f"{folder}: tensor {extra[0]!r} has no place in the adapter that {CONFIG} describes for this base"
        )
    for name, place in places.items():  # all of them before any array is made
        if name not in stored:
            raise UserError(
                f"{folder}: tensor '{name}' is missing, which {CONFIG} asks for with this base"
            )
        if (shape := stored[name].shape) != place.shape:
            resized = (
                "; was its vocabulary resized?"
                if place.path.endswith("/embedding") and place.part != "rows"
                else ""
            )
            raise UserError(
                f"{folder}: tensor '{name}' has shape {list(shape)}, this base and {CONFIG} ask for {list(place.shape)}{resized}"
            )

    def fresh(path: str, part: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        # Where a layer has no adapter nothing is read: zero factors, lengths that are never used,
        # or the base's own values.
        if part in ("a", "b", "magnitude", "rows") or base.is_abstract:
            return np.full(leaf.shape, part == "magnitude", np.float32)
        return np.array(base.leaves[path], np.float32)

    adapters = {
        path: {part: fresh(path, part, leaf) for part, leaf in parts.items()}
        for path, parts in shapes.items()
    }
    filled: dict[Any, str] = {}
    for name, place in places.items():
        array = at(adapters[place.path][place.part], place.layer)
        view = (array.T if place.transpose else array)[tuple(slice(n) for n in place.shape)]
        if (twin := filled.setdefault(place[:3], name)) != name and not np.array_equal(
            view, stored[name]
        ):
            raise UserError(f"{folder}: tensor '{name}' is not as '{twin}'; {UNTIED}")
        view[...] = stored[name]
    return jax.tree.map(jnp.asarray, adapters)
