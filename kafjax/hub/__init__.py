"""Weights and tokenizers, in and out: named models from packages, any Hugging Face folder of a
supported family."""

from kafjax.hub.load import (
    adapter_folder,
    cache_dir,
    chat_template,
    describe,
    describe_decoder,
    folder_of,
    load,
    load_cross_encoder,
    load_decoder,
    load_params,
    tokenizer,
)
from kafjax.hub.peft import load_peft, save_peft
from kafjax.hub.safetensors_out import save
from kafjax.hub.trained import load_trained, save_trained

__all__ = [
    "adapter_folder",
    "cache_dir",
    "chat_template",
    "describe",
    "describe_decoder",
    "folder_of",
    "load",
    "load_cross_encoder",
    "load_decoder",
    "load_params",
    "load_peft",
    "load_trained",
    "save",
    "save_peft",
    "save_trained",
    "tokenizer",
]
