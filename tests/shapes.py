"""Shapes of tiny decoders: a sliding and a full layer, sequences longer than the window."""

from __future__ import annotations

import dataclasses

from kafjax.models import DecoderConfig

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    sliding=(True, False),
    window=5,
)
ONE_KEY_HEAD = dataclasses.replace(TINY, n_kv_heads=1, window=4)
DIVISIBLE = dataclasses.replace(TINY, vocab_size=64, n_heads=4)  # over the axes of a mesh
