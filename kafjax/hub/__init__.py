"""Weights and tokenizers, in: named models from packages, any Hugging Face folder of a supported family."""

from kafjax.hub.load import cache_dir, load, tokenizer

__all__ = ["cache_dir", "load", "tokenizer"]
