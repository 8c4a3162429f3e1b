"""Weights and tokenizers, in and out: named models from packages, any Hugging Face folder of a supported family."""

from kafjax.hub.load import cache_dir, load, tokenizer
from kafjax.hub.peft import load_peft, save_peft
from kafjax.hub.safetensors_out import save

__all__ = ["cache_dir", "load", "load_peft", "save", "save_peft", "tokenizer"]
