"""LoRA as a transform of parameter trees: `init` an adapter, `attach` it to train or run, `merge`
it for good."""

from kafjax.lora import lanes
from kafjax.lora.arithmetic import compress, weighted_sum
from kafjax.lora.files import load, save
from kafjax.lora.spec import (
    INITS,
    PRESETS,
    VARIANTS,
    Spec,
    alphas,
    count,
    explicit,
    ranks,
    scales,
    trained,
    variant,
)
from kafjax.lora.transform import (
    Adapters,
    abstract,
    attach,
    axes,
    check_adapters,
    drift,
    init,
    merge,
    plain,
    residual,
    shapes,
)

__all__ = [
    "INITS",
    "PRESETS",
    "VARIANTS",
    "Adapters",
    "Spec",
    "abstract",
    "alphas",
    "attach",
    "axes",
    "check_adapters",
    "compress",
    "count",
    "drift",
    "explicit",
    "init",
    "lanes",
    "load",
    "merge",
    "plain",
    "ranks",
    "residual",
    "save",
    "scales",
    "shapes",
    "trained",
    "variant",
    "weighted_sum",
]
