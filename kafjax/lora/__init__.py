"""LoRA as a transform of parameter trees: `init` an adapter, `attach` it to train or run, `merge` it for good."""

from kafjax.lora import lanes
from kafjax.lora.files import load, save
from kafjax.lora.spec import INITS, PRESETS, VARIANTS, Spec, count, ranks, scales, variant
from kafjax.lora.transform import Adapters, abstract, attach, axes, drift, init, merge, plain, residual

__all__ = [
    "INITS",
    "PRESETS",
    "VARIANTS",
    "Adapters",
    "Spec",
    "abstract",
    "attach",
    "axes",
    "count",
    "drift",
    "init",
    "lanes",
    "load",
    "merge",
    "plain",
    "ranks",
    "residual",
    "save",
    "scales",
    "variant",
]
