"""Takes what a run has learned out of it, in the form that others read: a whole model, PEFT's adapter, or kafjax's own.

    python -m scripts.export --run=runs/NAME --out=my-adapter                    a folder for peft, vLLM and others (--format=peft)
    python -m scripts.export --run=runs/NAME --format=merged --out=my-model      a whole model, as transformers loads it
    python -m scripts.export --run=runs/NAME --format=merged --dtype=bfloat16 --out=my-model       half the size, and rounded
    python -m scripts.export --run=runs/SWEEP/lanes/LANE --out=my-adapter        one lane of a sweep
    python -m scripts.export --run=runs/COMPARISON/artifacts/full --format=merged --out=my-model
    python -m scripts.export --adapter=FOLDER --model=MODEL --format=kafjax --out=adapter.safetensors   from PEFT into kafjax
    python -m scripts.export --adapter=FOLDER --model=MODEL --format=merged --out=my-model         an adapter of PEFT merged

--run is a run of experiments.finetune (full or LoRA), a lane's folder of a sweep, or a method's folder of a comparison; its model is
read from its config.json or one above. What was trained in full has no adapter: its format is merged. --adapter is a file
adapter.safetensors, or a folder in PEFT's format. A whole model keeps the tokenizer, chat template and generation settings of its base.
A model card (README.md) says what it was made of, with the run's command and scores.
A merged adapter is added up in float32 and rounded once, to --dtype; what the rounding costs is printed: if it is not far below the
update itself, keep float32, or ship the adapter. What PEFT cannot say is refused by name (docs/peft.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kafjax import hub, lora
from kafjax.core import trees
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import waiting
from kafjax.core.rundir import read_object
from kafjax.models import Decoder
from scripts.card import model_card

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
ADAPTER = "adapter.safetensors"
N_TOKENS = 32  # that the merged model is tried on
N_SHOWN = 5  # parameters, those that the rounding moves most

flags.DEFINE_string("run", None, "Folder of a run of experiments.finetune, of a lane, or of a method of a comparison.")
flags.DEFINE_string("adapter", None, "Instead of --run: a file adapter.safetensors, or a folder in PEFT's format, or ORG/NAME of the hub.")
flags.DEFINE_string("model", None, "The base: gemma3-270m, a folder, or ORG/NAME of the hub (default: what the run was trained on).")
flags.DEFINE_enum("format", "peft", ["peft", "merged", "kafjax"], "peft: a folder; merged: a model's folder; kafjax: one file.")
flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of a merged model's weights.")
flags.DEFINE_string("base_name", "", "How transformers knows the base, such as google/gemma-3-270m; kept in PEFT's configuration.")
flags.DEFINE_string("out", None, "Folder (or, of kafjax, file) to make; must not exist.")


def _main(_: list[str]) -> None:
    values = flags.FLAGS
    for flag in ("out", "run", "adapter"):
        if "://" in (values[flag].value or ""):
            raise UserError(f"--{flag}: buckets cannot be read or written here; give a folder of this machine, or one mounted on it")
    if not values.out:
        raise UserError("say where to: --out=FOLDER")
    if (out := Path(values.out)).is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out, or delete it")
    path, name = _source()
    with waiting("model", f"loading {name}"):
        model, params = hub.load_decoder(name)
    trained = None if values.run is None else Path(values.run)
    if path.name != ADAPTER and not (path / "adapter_config.json").is_file() and _has_weights(path):
        _export_full(out, model, hub.load_trained(path, params), name, model_card(_base_name(name), "transformers", trained, None))
        return
    adapters, spec = hub.load_peft(path, model, params) if path.is_dir() else lora.load(path, params)
    if values.format == "kafjax":
        lora.save(out, adapters, spec)
        print(f"{out}: read it with kafjax.lora.load")
    elif values.format == "peft":
        card = model_card(values.base_name or _base_name(name), "peft", trained, spec)
        hub.save_peft(out, adapters, spec, model, params, base_name=values.base_name, card=card)
        print(f"{out}: read it with peft.PeftModel.from_pretrained(base, {str(out)!r})")
    else:
        _merge(out, model, params, adapters, spec, name, model_card(_base_name(name), "transformers", trained, spec))


def _source() -> tuple[Path, str]:
    """The adapter and the name of its base."""
    run, adapter, model = flags.FLAGS.run, flags.FLAGS.adapter, flags.FLAGS.model
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
            raise UserError(f"nothing was trained in {run}: it holds no adapter and no weights; train with python -m experiments.finetune")
        if flags.FLAGS.format != "merged":
            raise UserError(f"{run} holds whole weights, which are no adapter; export them with --format=merged")
    if model is None:
        config = next((file for folder in (Path(run), *Path(run).parents[:2]) if (file := folder / "config.json").is_file()), None)
        model = read_object(config).get("model") if config else None
        if not isinstance(model, str):
            raise UserError(f"{run} has no config.json that names the model; say --model=")
    return path, model


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("weights*.safetensors"))


def _export_full(out: Path, model: Decoder, params: trees.Tree, name: str, card: str) -> None:
    """Writes a model that was trained in full."""
    dtype = DTYPES[flags.FLAGS.dtype]
    _save(out, model, _finite(jax.tree.map(lambda leaf: leaf.astype(dtype), params)), name, card)


def _base_name(name: str) -> str:
    """Returns the name of the base for a card: a name as it is, a folder without its parents."""
    return Path(name).name if Path(name).exists() else name


def _save(out: Path, model: Decoder, params: trees.Tree, name: str, card: str) -> None:
    hub.save(out, model, params, tokenizer=hub.folder_of(name), card=card)
    print(f"{out}: read it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}), or kafjax's --model={out}")


def _finite(params: trees.Tree) -> trees.Tree:
    for path, leaf in trees.flatten(params).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise UserError(f"'{path}' has no finite {flags.FLAGS.dtype}; merge into float32 or bfloat16")
    return params


def _merge(
    out: Path, model: Decoder, params: trees.Tree, adapters: lora.Adapters, spec: lora.Spec, name: str, card: str
) -> None:
    dtype = DTYPES[flags.FLAGS.dtype]
    exact = lora.merge(params, adapters, spec)
    merged = _finite(jax.tree.map(lambda leaf: leaf.astype(dtype), exact))
    _save(out, model, merged, name, card)
    rows = sorted(_drift(params, exact, merged, adapters), key=lambda row: row[1], reverse=True)
    print(f"\nDrift by rounding to {flags.FLAGS.dtype}, largest of {len(rows)} parameters:\n  of weights   of update    parameter")
    for path, of_weights, of_update in rows[:N_SHOWN]:
        print(f"  {of_weights:.2e}     {of_update:.2e}     {path}")
    tokens = jax.random.randint(jax.random.key(0), (1, N_TOKENS), 0, model.config.vocab_size)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), merged)
    base, with_adapter, with_merged = map(jax.jit(lambda p: model.apply(p, tokens)), (params, lora.attach(params, adapters, spec), rounded))
    off, moved = (float(jnp.abs(with_adapter - other).max()) for other in (with_merged, base))
    print(f"  logits of {N_TOKENS} random tokens: off by {off:.2e} at most; the adapter moves them by up to {moved:.2e}")


def _drift(params: trees.Tree, exact: trees.Tree, merged: trees.Tree, changed: Iterable[str]) -> list[tuple[str, float, float]]:
    """Computes `max |cast - exact|` of each changed parameter, as a share of `max |exact|` and of the largest change."""
    flat = [trees.flatten(tree) for tree in (params, exact, merged)]

    def of(path: str) -> tuple[str, float, float]:
        before, after, cast = (np.asarray(tree[path], np.float32) for tree in flat)
        lost = float(np.abs(cast - after).max())
        return path, lost / max(float(np.abs(after).max()), 1e-30), lost / max(float(np.abs(after - before).max()), 1e-30)

    return [of(path) for path in changed]


def main() -> None:
    run_main(_main)


if __name__ == "__main__":
    main()
