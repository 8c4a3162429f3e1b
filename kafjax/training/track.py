"""A wandb mirror of a run: metrics, figures, tables, what it took. The files of the run's folder
remain the source."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kafjax.core import paths, rundir
from kafjax.core.errors import UserError

MODES = ("off", "offline", "online")


class Track:
    """Mirror of one run; it does nothing without a `run` of wandb."""

    def __init__(self, run: Any = None):
        self._run = run

    def __call__(self, label: str, step: int, **values: float) -> None:
        """Mirrors a row of metrics. Each label counts its own steps, which wandb's one global step
        cannot."""
        if self._run is not None:
            named = {f"{label}/{name}": value for name, value in values.items()}
            self._run.log({f"{label}/step": step, **named})

    def figure(self, name: str, png: bytes) -> None:
        if self._run is not None:
            import wandb

            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                file.write(png)
                file.flush()
                self._run.log({name: wandb.Image(file.name)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[*map(list, rows)])})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Notes what a run came to, one number a name."""
        if self._run is not None:
            self._run.summary.update(
                {name: value for name, value in values.items() if isinstance(value, int | float)}
            )


@contextlib.contextmanager
def tracker(run_dir: Path, mode: str, config: Mapping[str, Any]) -> Generator[Track]:
    """`with tracker(...) as track: track(label="lora", step=3, loss=1.2)`.

    The id is a hash of the run's name and configuration: a resumed run keeps it, in any folder and
    on any machine. Runs of a sweep are a group (`WANDB_RUN_GROUP`, which its workers set).

    Args:
      mode: of `MODES`. Offline writes to `run_dir/wandb`, for `wandb sync` to upload.
      config: of the run, as config.json holds it.

    Raises:
      UserError: wandb is not installed, or refuses (no account, no network).
    """
    if mode == "off":
        yield Track()
        return
    try:
        import wandb  # slow to import, and needed by few
    except ImportError as error:
        raise UserError(f"--wandb={mode} needs wandb; run: pip install wandb") from error
    with contextlib.ExitStack() as opened:
        if paths.is_address(run_dir):
            if mode == "offline":
                raise UserError(
                    f"--wandb=offline writes files that grow, which {run_dir} cannot; give --wandb=online"
                )
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wandb-")))
        else:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder = run_dir
        try:
            run = wandb.init(
                project="kafjax",
                name=run_dir.name,
                id=rundir.config_hash({"name": run_dir.name, "config": dict(config)}),
                resume="allow",
                reinit="create_new",  # the runs of a pack are in one process
                dir=folder,
                config=dict(config),
                mode="offline" if mode == "offline" else "online",
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(f"--wandb={mode}: {' '.join(str(error).split())[:200]}") from error
        opened.callback(run.finish)
        yield Track(run)
