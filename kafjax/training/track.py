"""An offline wandb mirror of a run's metrics, for comparing curves. `metrics.jsonl` remains the
source."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, cast

from kafjax.core import rundir
from kafjax.core.errors import UserError


@contextlib.contextmanager
def tracker(
    run_dir: Path, enabled: bool, config: Mapping[str, Any]
) -> Generator[Callable[..., None]]:
    """`with tracker(...) as track: track(label="lora", step=3, loss=1.2)`; does nothing unless
    `enabled`.

    Writes to `run_dir/wandb`, for `wandb sync` to upload; `WANDB_MODE=online` uploads at once. A
    resumed run keeps its wandb id.

    Raises:
      UserError: wandb is enabled and not installed.
    """
    if not enabled:
        yield lambda **row: None
        return
    try:
        import wandb  # slow to import, and needed by few
    except ImportError as error:
        raise UserError("--wandb needs the wandb package; run: pip install wandb") from error
    run_dir.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="kafjax",
        name=run_dir.name,
        id=rundir.config_hash({"path": str(run_dir.resolve()), "config": dict(config)}),
        resume="allow",
        dir=run_dir,
        config=dict(config),
        mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),  # wandb checks it
        settings=wandb.Settings(silent=True),
    )

    def track(label: str, step: int, **values: float) -> None:
        # Each label counts its own steps, which wandb's one global step cannot.
        run.log(
            {f"{label}/step": step, **{f"{label}/{name}": value for name, value in values.items()}}
        )

    try:
        yield track
    finally:
        run.finish()
