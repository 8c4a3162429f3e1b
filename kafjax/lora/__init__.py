"""LoRA as a transform of parameter trees: `init` an adapter, `attach` it to train or run, `merge` it for good."""

from kafjax.lora import lanes
from kafjax.lora.files import load, save
from kafjax.lora.spec import Spec
from kafjax.lora.transform import Adapters, abstract, attach, axes, drift, init, merge

__all__ = ["Adapters", "Spec", "abstract", "attach", "axes", "drift", "init", "lanes", "load", "merge", "save"]
