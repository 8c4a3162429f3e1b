"""The way out is the inverse of the way in, for every table of names."""

from __future__ import annotations

import numpy as np
import pytest

from kafjax.core import trees
from kafjax.hub import names
from kafjax.hub.assemble import assemble
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Decoder, DecoderConfig, Encoder, EncoderConfig

GEMMA = Decoder(
    DecoderConfig(
        vocab_size=13,
        hidden_size=8,
        mlp_size=12,
        n_layers=3,
        n_heads=2,
        n_kv_heads=1,
        head_dim=6,
        sliding=(True, True, False),
        window=4,
    )
)
BERT = Encoder(EncoderConfig(vocab_size=13, hidden_size=8, mlp_size=12, n_layers=3, n_heads=2))


@pytest.mark.parametrize(
    ("model", "entries"), [(GEMMA, names.GEMMA3), (GEMMA, names.GEMMA3_GGUF), (BERT, names.BERT)]
)
def test_there_and_back_again(model, entries):
    rng = np.random.default_rng(0)
    params = trees.map_with_path(
        lambda _, leaf: rng.standard_normal(leaf.shape, np.float32), model.abstract_params()
    )
    tensors = dict(hf_tensors(params, entries))
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    back = trees.flatten(assemble(tensors.items(), entries, model.abstract_params(), "memory"))
    assert back.keys() == trees.flatten(params).keys()
    for path, leaf in trees.flatten(params).items():
        # Norm scales of GGUF carry an offset, which costs a rounding.
        np.testing.assert_allclose(back[path], leaf, rtol=0, atol=2e-7, err_msg=path)
