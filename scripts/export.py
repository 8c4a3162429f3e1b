"""Takes what a run has learned out of it, in the form that others read: a whole model, PEFT's
adapter, or kafjax's own.

    python -m scripts.export --run=runs/NAME --out=my-adapter                    a folder for peft, vLLM and others (--format=peft)
    python -m scripts.export --run=runs/NAME --format=merged --out=my-model      a whole model, as transformers loads it
    python -m scripts.export --run=runs/NAME --format=merged --dtype=bfloat16 --out=my-model       half the size, and rounded
    python -m scripts.export --run=runs/SWEEP/lanes/LANE --out=my-adapter        one lane of a sweep
    python -m scripts.export --run=runs/COMPARISON/artifacts/full --format=merged --out=my-model
    python -m scripts.export --adapter=FOLDER --model=MODEL --format=kafjax --out=adapter.safetensors   from PEFT into kafjax
    python -m scripts.export --adapter=FOLDER --model=MODEL --format=merged --out=my-model         an adapter of PEFT merged

--run is a run of experiments.finetune (full or LoRA), a lane's folder of a sweep, or a method's
folder of a comparison; its model is read from its config.json or one above. What was trained in
full has no adapter: its format is merged. --adapter is a file adapter.safetensors, or a folder in
PEFT's format. A whole model keeps the tokenizer, chat template and generation settings of its base.
A model card (README.md) says what it was made of, with the run's command and scores. A merged
adapter is added up in float32 and rounded once, to --dtype; what the rounding costs is printed: if
it is not far below the update itself, keep float32, or ship the adapter. What PEFT cannot say is
refused by name (docs/peft.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build
from experiments.configs.export import Export
from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.progress import waiting
from kafjax.core.rundir import read_object
from kafjax.lora.files import ADAPTER
from kafjax.models import Decoder
from scripts.card import model_card

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
N_TOKENS = 32  # that the merged model is tried on
N_SHOWN = 5  # parameters, those that the rounding moves most


def run(config: Export) -> None:
    """Writes the export. Raises `UserError` for anything that the user can mend, before a file is
    written wherever it can be known."""
    if not config.out:
        raise UserError("say where to: --out=FOLDER")
    if (out := Path(config.out)).is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out, or delete it")
    path, name = _source(config)
    with waiting("model", f"loading {name}"):
        model, params = hub.load_decoder(name)
    trained = None if config.run is None else Path(config.run)
    if path.name != ADAPTER and not (path / "adapter_config.json").is_file() and _has_weights(path):
        card = model_card(_base_name(name), "transformers", trained, None)
        _save(out, model, _cast(hub.load_trained(path, params), config.dtype), name, card)
        return
    adapters, spec = (
        hub.load_peft(path, model, params) if path.is_dir() else lora.load(path, params)
    )
    if config.format == "kafjax":
        lora.save(out, adapters, spec)
        print(f"{out}: read it with kafjax.lora.load")
    elif config.format == "peft":
        card = model_card(config.base_name or _base_name(name), "peft", trained, spec)
        hub.save_peft(out, adapters, spec, model, params, base_name=config.base_name, card=card)
        print(f"{out}: read it with peft.PeftModel.from_pretrained(base, {str(out)!r})")
    else:
        merged, drift = _merge(model, params, adapters, spec, config.dtype)
        _save(out, model, merged, name, model_card(_base_name(name), "transformers", trained, spec))
        print(drift)


def _source(config: Export) -> tuple[Path, str]:
    """Finds the adapter, or the folder of whole weights, and the name of its base."""
    run, adapter, model = config.run, config.adapter, config.model
    if (run is None) == (adapter is None):
        raise UserError("say what to export: either --run=runs/NAME or --adapter=FILE")
    if adapter is not None:
        if model is None:
            raise UserError("say what the adapter was trained on: --model=gemma3-270m, or a folder")
        return hub.adapter_folder(adapter), model
    path = Path(run) / ADAPTER
    if not path.is_file():
        path = Path(run)
        if not _has_weights(path):
            raise UserError(
                f"nothing was trained in {run}: it holds no adapter and no weights; train with python -m experiments.finetune"
            )
        if config.format != "merged":
            raise UserError(
                f"{run} holds whole weights, which are no adapter; export them with --format=merged"
            )
    if model is None:
        stored = next(
            (
                file
                for folder in (Path(run), *Path(run).parents[:2])
                if (file := folder / "config.json").is_file()
            ),
            None,
        )
        model = read_object(stored).get("model") if stored else None
        if not isinstance(model, str):
            raise UserError(f"{run} has no config.json that names the model; say --model=")
    return path, model


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("weights*.safetensors"))


def _base_name(name: str) -> str:
    """Returns the name of the base for a card: a name as it is, a folder without its parents."""
    return Path(name).name if Path(name).exists() else name


def _save(out: Path, model: Decoder, params: trees.Tree, name: str, card: str) -> None:
    hub.save(out, model, params, tokenizer=hub.folder_of(name), card=card)
    print(
        f"{out}: read it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}), or kafjax's --model={out}"
    )


def _cast(params: trees.Tree, dtype: str) -> trees.Tree:
    """Rounds the parameters to a type of `DTYPES`. Raises `UserError` for one that has no finite
    value there."""
    cast = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), params)
    for path, leaf in trees.flatten(cast).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise UserError(f"'{path}' has no finite {dtype}; merge into float32 or bfloat16")
    return cast


def _merge(
    model: Decoder, params: trees.Tree, adapters: lora.Adapters, spec: lora.Spec, dtype: str
) -> tuple[trees.Tree, str]:
    """Adds the adapter to the weights and rounds them; returns them with what the rounding costs,
    in lines for the terminal."""
    exact = lora.merge(params, adapters, spec)
    merged = _cast(exact, dtype)
    rows = sorted(_drift(params, exact, merged, adapters), key=lambda row: row[1], reverse=True)
    lines = [
        f"\nDrift by rounding to {dtype}, largest of {len(rows)} parameters:",
        "  of weights   of update    parameter",
    ]
    lines += [
        f"  {of_weights:.2e}     {of_update:.2e}     {path}"
        for path, of_weights, of_update in rows[:N_SHOWN]
    ]
    tokens = jax.random.randint(jax.random.key(0), (1, N_TOKENS), 0, model.config.vocab_size)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), merged)
    base, with_adapter, with_merged = map(
        jax.jit(lambda p: model.apply(p, tokens)),
        (params, lora.attach(params, adapters, spec), rounded),
    )
    off, moved = (float(jnp.abs(with_adapter - other).max()) for other in (with_merged, base))
    lines.append(
        f"  logits of {N_TOKENS} random tokens: off by {off:.2e} at most; the adapter moves them by up to {moved:.2e}"
    )
    return merged, "\n".join(lines)


def _drift(
    params: trees.Tree, exact: trees.Tree, merged: trees.Tree, changed: Iterable[str]
) -> list[tuple[str, float, float]]:
    """Computes `max |cast - exact|` of each changed parameter, as a share of `max |exact|` and of
    the largest change."""
    flat = [trees.flatten(tree) for tree in (params, exact, merged)]

    def of(path: str) -> tuple[str, float, float]:
        before, after, cast = (np.asarray(tree[path], np.float32) for tree in flat)
        lost = float(np.abs(cast - after).max())
        return (
            path,
            lost / max(float(np.abs(after).max()), 1e-30),
            lost / max(float(np.abs(after - before).max()), 1e-30),
        )

    return [of(path) for path in changed]


def main() -> None:
    build.start(Export, run)


if __name__ == "__main__":
    main()
