"""Files of adapters as anybody may have written them: read, or refused in one short line; never
another exception, never a hang."""

from __future__ import annotations

import json
import struct

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import peft
import pytest
from oracles import carry_over, tiny_hf

from kafjax import hub, lora
from kafjax.core.errors import UserError
from kafjax.core.rundir import write_json

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES |= st.sampled_from(
    [
        "",
        "all-linear",
        "q_proj",
        "lm_head",
        "embed_tokens",
        "norm",
        ".*",
        "(",
        "(a+)+$",
        "pissa",
        "olora",
        "all",
        "\n",
    ]
)
JSON = st.recursive(
    VALUES | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["q_proj", ".*", "("]) | st.text(max_size=8), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return carry_over(
        tiny_hf("qwen2", num_hidden_layers=2, tie_word_embeddings=True),
        tmp_path_factory.mktemp("base"),
    )


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """An adapter that `save_peft` wrote, with every field that PEFT of today has in its
    configuration."""
    model, params = base
    spec = lora.Spec(rank=2, targets="(q|up)_proj", token_rows=(3, 4))
    made = tmp_path_factory.mktemp("made") / "adapter"
    hub.save_peft(made, lora.init(spec, params, jax.random.key(0)), spec, model, params)
    settings = json.loads((made / "adapter_config.json").read_text())
    write_json(
        made / "adapter_config.json",
        {**json.loads(json.dumps(peft.LoraConfig(r=2).to_dict())), **settings},
    )
    hub.load_peft(made, model, params)
    return made


def read_or_refused(read) -> None:
    try:
        read()
    except UserError as error:
        assert len(str(error)) < 700 and "\n" not in str(error)


def test_any_change_of_a_configuration(base, folder, request):
    file = folder / "adapter_config.json"
    plain = json.loads(file.read_text())
    keys = st.sampled_from(sorted({*plain, "a_field_of_tomorrow"}))

    @hypothesis.given(
        st.dictionaries(keys | st.text(max_size=5), JSON, min_size=1, max_size=3),
        st.lists(keys, max_size=2),
    )
    @hypothesis.settings(
        max_examples=request.config.getoption("--fuzz"), derandomize=True, deadline=None
    )
    def check(changes, missing):
        file.write_text(
            json.dumps(
                {key: value for key, value in {**plain, **changes}.items() if key not in missing}
            )
        )
        read_or_refused(lambda: hub.load_peft(folder, *base))

    check()
    write_json(file, plain)


def header_changed(data: bytes, change) -> bytes:
    """A safetensors file whose JSON header `change` has changed."""
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


NAMES = st.text(max_size=12) | st.sampled_from(
    [
        *(
            f"base_model.model.{name}"
            for name in (
                "lm_head.weight",
                "model.embed_tokens.base_layer.weight",
                "lm_head.lora_A.weight",
                "a\nb",
            )
        ),
        *(
            f"base_model.model.model.layers.{i}.self_attn.q_proj.{part}"
            for i in (0, 9)
            for part in ("lora_A.weight", "lora_C", "bias")
        ),
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
        "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
    ]
)


def test_any_change_of_the_tensors(base, folder, request):
    file = folder / "adapter_model.safetensors"
    plain = file.read_bytes()
    (n,) = struct.unpack("<Q", plain[:8])
    names = sorted(json.loads(plain[8 : 8 + n]).keys() - {"__metadata__"})
    shapes = st.lists(st.integers(0, 2**40), max_size=4)

    @hypothesis.given(
        st.sampled_from(names),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F16", "BF16", "I64", "F64", "BOOL", "X"]),
                "shape": shapes,
            },
        ),
        NAMES,
        st.booleans(),
    )
    @hypothesis.settings(
        max_examples=request.config.getoption("--fuzz"), derandomize=True, deadline=None
    )
    def check(name, changes, new_name, is_renamed):
        def change(header):
            header[new_name if is_renamed else name] = {**header.pop(name), **changes}

        file.write_bytes(header_changed(plain, change))
        read_or_refused(lambda: hub.load_peft(folder, *base))

    check()
    file.write_bytes(plain)


def test_any_change_of_the_settings_in_an_adapter_of_ours(base, tmp_path, request):
    params, file = base[1], tmp_path / "adapter.safetensors"
    spec = lora.Spec(rank=2, targets="(q|up)_proj")
    lora.save(file, lora.init(spec, params, jax.random.key(0)), spec)
    plain, settings = file.read_bytes(), json.loads(json.dumps(lora.Spec().__dict__))
    keys = st.sampled_from(sorted({*settings, "a_field_of_tomorrow"}))

    @hypothesis.given(st.dictionaries(keys, JSON, min_size=1, max_size=3) | JSON)
    @hypothesis.settings(
        max_examples=request.config.getoption("--fuzz"), derandomize=True, deadline=None
    )
    def check(changes):
        changed = (
            {**settings, "rank": 2, "targets": "(q|up)_proj", **changes}
            if isinstance(changes, dict)
            else changes
        )
        file.write_bytes(
            header_changed(
                plain, lambda header: header["__metadata__"].update(spec=json.dumps(changed))
            )
        )
        read_or_refused(lambda: lora.load(file, params))

    check()


def test_thousands_of_patterns_are_read_at_once(base, folder):
    """EVA writes a rank for each module. Here none of the patterns matches."""
    file = folder / "adapter_config.json"
    plain = json.loads(file.read_text())
    write_json(file, {**plain, "rank_pattern": {f"layers.{i}.none": 2 for i in range(3000)}})
    hub.load_peft(folder, *base)
    write_json(file, {**plain, "rank_pattern": {f"{i}": 2 for i in range(200_000)}})
    with pytest.raises(UserError, match="rank_pattern has 200000 entries"):
        hub.load_peft(folder, *base)
    write_json(file, plain)
    assert np.all(hub.load_peft(folder, *base)[1].rank == 2)
