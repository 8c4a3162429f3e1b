"""A quantised base writes what the same base in floats writes, alone and with adapters beside
it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kafjax import lora
from kafjax.generation import Sampling
from kafjax.ops.quantized import FORMATS, dequantize_params, quantize_params

PROMPTS = [
    "The lamp",
    "A fox, two hens and a grey goose share the yard",
    "Whoever asks for the name of the miller will be",
]
SPEC = lora.Spec(rank=2)


@pytest.mark.parametrize("format", FORMATS)
def test_replies_are_those_of_the_dequantised_base(generator, naive, params, format):
    base = quantize_params(params, format)
    floats = dequantize_params(base)
    adapters = jax.tree.map(lambda x: x + 0.3, lora.init(SPEC, base, jax.random.key(1)))
    sampling = Sampling(max_new_tokens=10, stop=())

    def tokens(params, **slots):
        return [
            list(reply.tokens) for reply in generator.generate(params, PROMPTS, sampling, **slots)
        ]

    plain, adapted = (
        naive(floats, PROMPTS, 10),
        naive(lora.attach(floats, adapters, SPEC), PROMPTS, 10),
    )
    assert tokens(base) == plain and tokens(lora.attach(base, adapters, SPEC)) == adapted

    shapes = lora.lanes.padded_shapes([SPEC], base)
    slots = lora.lanes.empty_slots(base, shapes, 2)
    slots = lora.lanes.put(
        slots, 1, lora.lanes.pad(adapters, shapes), lora.lanes.scales(SPEC, base, shapes)
    )
    assert tokens(slots, adapters=[1, 0, 1]) == [adapted[0], plain[1], adapted[2]]
    assert len(np.unique([len(set(row)) for row in [*plain, *adapted]])) > 1 and adapted != plain
