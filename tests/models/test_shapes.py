"""The table of published decoders against the parameter counts that were published with them."""

from __future__ import annotations

import pytest
import torch
import transformers

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import CONFIGS, Decoder, DecoderConfig, named

# Parameters in the safetensors files of the models' own repositories.
PUBLISHED = {
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "phi3-mini-4k": 3_821_079_552,
    "phi4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "olmo2-7b": 7_298_617_344,
    "olmo3-7b": 7_298_011_136,
}
# With the vision tower and its projector (a matrix from 1152 and a norm over 1152), which the files
# hold, too.
MULTIMODAL = {
    "gemma3-4b": 4_300_079_472,
    "gemma3-12b": 12_187_325_040,
    "gemma3-27b": 27_432_406_640,
}


# whose files hold towers for images and sound, too
GEMMA4 = ("gemma4-e2b", "gemma4-e4b", "gemma4-31b")


def size(name: str) -> int:
    return trees.count(Decoder(CONFIGS[name]).abstract_params())


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - MULTIMODAL.keys() - {*GEMMA4}))
def test_parameters_are_as_many_as_published(name):
    assert size(name) == PUBLISHED[name]


def test_the_multimodal_models_differ_from_the_published_ones_by_one_vision_tower():
    towers = {
        total - size(name) - 1152 * CONFIGS[name].hidden_size - 1152
        for name, total in MULTIMODAL.items()
    }
    assert len(towers) == 1 and 4.1e8 < towers.pop() < 4.2e8


@pytest.mark.parametrize("name", GEMMA4)
def test_the_language_part_of_gemma4_has_as_many_parameters_as_in_transformers(name):
    config = {
        key: value
        for key, value in CONFIGS[name].to_hf().items()
        if key not in ("model_type", "architectures")
    }
    with torch.device("meta"):
        theirs = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**config))
    # a buffer of one number a layer
    assert size(name) == theirs.num_parameters() + CONFIGS[name].n_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_each_can_be_written_as_its_family_and_read_again(name):
    assert DecoderConfig.from_hf(CONFIGS[name].to_hf()) == CONFIGS[name]


def test_an_unknown_name_gets_the_nearest():
    assert named("qwen3-8b") is CONFIGS["qwen3-8b"]
    with pytest.raises(
        UserError, match=r"no published model 'llama3-8b'.*Did you mean 'llama3.1-8b'"
    ):
        named("llama3-8b")
