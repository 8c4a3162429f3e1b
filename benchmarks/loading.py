"""Host memory and time of loading a folder, measured in a process of its own. Linux only (/proc).

    python -m benchmarks.loading                                 random weights of Llama's form, 400 MB in float32
    python -m benchmarks.loading --megabytes=2000 --stored=bfloat16
    python -m benchmarks.loading --model=gemma3-270m

Counted is anonymous memory (RssAnon), looked at every millisecond: pages of the files themselves
are the page cache's, which the kernel drops when it needs room. On a CPU the parameters lie in the
same memory, so their size is taken off the peak: what is left is what loading holds beside its
result, in bytes and in multiples of the largest tensor.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import run_main
from kafjax.models import CONFIGS, Decoder

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")


def define_flags() -> None:
    flags.DEFINE_string(
        "model",
        None,
        "A named model or a folder; without it, random weights are written to a temporary one.",
    )
    flags.DEFINE_integer("megabytes", 400, "About the size of the random weights.", lower_bound=20)
    flags.DEFINE_enum("stored", "float32", DTYPES, "Type of the random weights.")
    flags.DEFINE_enum("loaded", "float32", DTYPES, "Type that they are loaded in.")
    flags.DEFINE_boolean(
        "here", False, "Measure in this process (what the command calls itself with)."
    )


def main(_: list[str]) -> None:
    values = flags.FLAGS
    if values.here:
        print(json.dumps(measured(values.model, values.loaded)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = values.model or write(
            Path(temporary) / "random", values.megabytes * 10**6, values.stored
        )
        command = [
            sys.executable,
            "-m",
            "benchmarks.loading",
            "--here",
            f"--model={model}",
            f"--loaded={values.loaded}",
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    row = json.loads(done.stdout.splitlines()[-1])
    mb = {name: row[name] / 1e6 for name in ("params", "largest", "beside")}
    print(
        f"{row['tensors']} tensors, parameters {mb['params']:.0f} MB, of them the largest tensor {mb['largest']:.0f} MB"
    )
    print(
        f"beside the parameters at the peak: {mb['beside']:.0f} MB, {mb['beside'] / mb['largest']:.2f} times the largest tensor"
    )
    print(
        f"first load {row['first_seconds']:.2f} s ({row['compile_seconds']:.2f} s of it compiling), second {row['second_seconds']:.2f} s"
    )


def write(folder: Path, n_bytes: int, dtype: str) -> Path:
    """A Llama of 16 layers with about so many bytes, its largest tensor a 28th of them."""
    width = 64 * round((n_bytes / jnp.dtype(dtype).itemsize / (16 * 13 + 16)) ** 0.5 / 64)
    sizes = {
        "vocab_size": 8 * width,
        "hidden_size": width,
        "mlp_size": 3 * width,
        "n_layers": 16,
        "n_heads": width // 64,
    }
    config = dataclasses.replace(
        CONFIGS["llama3.1-8b"], **sizes, n_kv_heads=width // 64, head_dim=64, sliding=(False,) * 16
    )
    config = dataclasses.replace(config, attention_scale=64**-0.5, eos_id=1)
    model = Decoder(config)
    hub.save(
        folder,
        model,
        jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.5, jnp.dtype(dtype)), model.abstract_params()
        ),
    )
    return folder


def measured(name: str, dtype: str) -> dict[str, float]:
    jax.devices()
    seconds: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: (
            seconds.append(duration) if event.endswith("backend_compile_duration") else None
        )
    )
    before, ended, seen = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.001):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model, params = hub.load(name, param_dtype=jnp.dtype(dtype))
    jax.block_until_ready(params)
    first = time.perf_counter() - began
    ended.set()
    watcher.join()
    sizes = [leaf.nbytes for leaf in trees.flatten(params).values()]
    largest = max(
        leaf.nbytes // (leaf.shape[0] if path.startswith("layers/") else 1)
        for path, leaf in trees.flatten(params).items()
    )
    n_layers = model.config.n_layers
    row = {
        "tensors": sum(
            n_layers if path.startswith("layers/") else 1 for path in trees.flatten(params)
        ),
        "params": sum(sizes),
        "largest": largest,
        "beside": seen[0] - before - sum(sizes),
        "first_seconds": first,
        "compile_seconds": sum(seconds),
    }
    del params
    began = time.perf_counter()
    jax.block_until_ready(hub.load(name, param_dtype=jnp.dtype(dtype))[1])
    return {**row, "second_seconds": time.perf_counter() - began}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]
    )


if __name__ == "__main__":
    define_flags()
    run_main(main)
