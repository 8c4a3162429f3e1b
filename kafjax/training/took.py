"""`Took`: the record of what a training took, kept as `result.json` by `finetune` and as
`learned.json` by a comparison's arms."""

from __future__ import annotations

import dataclasses
from typing import Any

from kafjax.core.schema import Amount, Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Took:
    """Cost and last loss of a training. Values with a default are missing in the records of older
    releases.

    Attributes:
      tokens: trained on, over all steps, padding not counted.
      targets: those of them whose prediction the loss looked at.
      seconds: wall time of the steps; compiling, checkpoints and set-up not counted.
      flops_measured: executed, over all steps: XLA's count without the loss, and the loss at the
        places that were computed.
      flops_useful: the same with the loss at targets alone; the difference is places that only fill
        up a chunk.
      argument_bytes, temporary_bytes: of the compiled step, on one device.
      peak_memory_bytes: see `PeakMemory`.
      final_loss: nats per token, of the last step.
      lanes: number of runs that trained in one program. If several, the seconds are this one's
        share, and the FLOPs those of the run alone.
    """

    steps: Count
    tokens: Count
    targets: Count | None = None
    seconds: Amount
    compile_seconds: Amount
    tokens_per_second: Amount
    trainable_parameters: Count
    optimizer_bytes: Count
    flops_measured: Amount
    flops_useful: Amount | None = None
    argument_bytes: Count | None = None
    temporary_bytes: Count | None = None
    peak_memory_bytes: Count
    final_loss: float | None = None
    lanes: Count = 1

    def record(self) -> dict[str, Any]:
        """Returns what is written as JSON: the fields of `Took`, also of a result that has more."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Took)}
