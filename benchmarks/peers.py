"""The peer's model with our weights."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from kafjax.core import trees
from kafjax.hub import names
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Decoder


def hf_model(
    model: Decoder, params: trees.Tree, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """transformers' model of the family with our weights. Raises `ValueError` for a weight that has
    no place on the other side."""
    hf_config = transformers.AutoConfig.for_model(**model.config.to_hf())
    hf_config.pad_token_id = None  # the embedding's row of a padding token would be left zero
    peer = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    places = dict(peer.named_parameters())
    for name, array in hf_tensors(params, names.TABLES[model.config.family]):
        if name not in places:
            raise ValueError(f"no place for weight {name}")
        # torch reads no bfloat16 of numpy's
        places.pop(name).data.copy_(torch.from_numpy(array.astype(np.float32)))
    if places:
        raise ValueError(f"no weight for {list(places)}")
    return peer
