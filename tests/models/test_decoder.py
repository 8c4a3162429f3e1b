"""The decoder against transformers on tiny random checkpoints of every family, and its paths
against each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import (
    FAMILIES,
    GROWING,
    YARN,
    carry_over,
    hf_logits,
    quick_jit,
    random_tokens,
    tiny_hf,
)

from kafjax.core import stacks, trees
from kafjax.core.errors import UserError
from kafjax.core.programs import compiler_options
from kafjax.hub.names import TABLES
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Cache, Decoder, caches

SLIDING, FULL = "sliding_attention", "full_attention"

# Half of the waves are kept or partly kept, the longer ones divided; 16 tokens are more than the
# original 12.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 1.0}
STRETCHED = {
    "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 12, "rope_theta": 100.0}
}
STRETCHED_BY_YARN = {"rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}
DIVIDED = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}

# Each switch of the configuration: what transformers is told, and the field here that has to carry
# it.
GEMMA_SWITCHES = {
    "biases and a head of its own": (
        {"attention_bias": True, "tie_word_embeddings": False},
        {"tied": True},
    ),
    "four query heads a key head, head size above hidden / heads": (
        {"num_key_value_heads": 1, "head_dim": 16},
        None,
    ),
    "as many key heads as query heads, head size below": (
        {"num_key_value_heads": 4, "head_dim": 4},
        None,
    ),
    "window of three": ({"sliding_window": 3}, {"window": 5}),
    "every layer slides": ({"layer_types": [SLIDING] * 4}, {"sliding": (True, False) * 2}),
    "no layer slides": ({"layer_types": [FULL] * 4}, {"sliding": (True, False) * 2}),
    "only the first layer is full, window of one": (
        {"layer_types": [FULL, SLIDING, SLIDING, SLIDING], "sliding_window": 1},
        {"sliding": (True, False) * 2},
    ),
    "other rotary bases": (
        {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            }
        },
        {"rope_theta": 1e6, "rope_theta_sliding": 1e4},
    ),
    "positions divided by three": (
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}},
        {"rope_factor": 1.0},
    ),
    "another attention scale": ({"query_pre_attn_scalar": 3}, {"attention_scale": 8**-0.5}),
    "another epsilon": ({"rms_norm_eps": 0.1}, {"norm_eps": 1e-6}),
}
# As the larger sizes are: values that are the keys, of fewer heads in full layers, and nothing for
# single layers.
KEYS_AS_VALUES = {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
SWITCHES = {
    f"gemma: {name}": ("gemma3_text", *switch) for name, switch in GEMMA_SWITCHES.items()
} | {
    "gemma4: shared keys, per-layer embeddings, wide MLPs": (
        "gemma4_text",
        {},
        {"rope_stretch": None},
    ),
    "gemma4: values are keys, in other numbers, biases, an untied head, a cap": (
        "gemma4_text",
        {
            **KEYS_AS_VALUES,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 0.5,
        },
        {"logit_cap": None},
    ),
    "gemma4: no period, narrow MLPs, smaller full heads": (
        "gemma4_text",
        {
            **{"num_hidden_layers": 5, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]},
            **{"use_double_wide_mlp": False, "global_head_dim": 4},
        },
        {"value_norm": False},
    ),
    "gemma4: layers of one shape, where all turns": (
        "gemma4_text",
        {
            **{
                "num_kv_shared_layers": 0,
                "global_head_dim": 8,
                "num_hidden_layers": 4,
                "layer_types": [SLIDING, FULL] * 2,
            },
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        {"rope_theta_sliding": 77.0},
    ),
    "gemma4: one sharing layer, no per-layer embeddings, positions divided": (
        "gemma4_text",
        {
            **{"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 0},
            "rope_parameters": {
                FULL: {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.3,
                    "factor": 3.0,
                    "rope_theta": 100.0,
                },
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        {"rope_factor": 1.0},
    ),
    "gemma2: caps that bind": (
        "gemma2",
        {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5},
        {"attention_cap": 2.0},
    ),
    "gemma2: a cap of logits alone, large heads": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 0.5,
            "head_dim": 16,
            "query_pre_attn_scalar": 3,
        },
        {"logit_cap": None},
    ),
    "gemma2: no caps, every other layer slides": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": None,
            "sliding_window": 3,
        },
        {"rope_theta_sliding": 77.0},
    ),
    "llama: stretched": ("llama", STRETCHED, {"rope_stretch": None}),
    "llama: biases, one large key head, another epsilon": (
        "llama",
        {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 0.1},
        {"norm_eps": 1e-6},
    ),
    "llama: tied, positions divided": (
        "llama",
        {"tie_word_embeddings": True, **DIVIDED},
        {"rope_factor": 1.0},
    ),
    "mistral: window of three, positions divided": (
        "mistral",
        {"sliding_window": 3, **DIVIDED},
        {"sliding": (False,) * 4},
    ),
    "mistral: no window, small heads": (
        "mistral",
        {"sliding_window": None, "head_dim": 4},
        {"norm_offset": 1.0},
    ),
    "ministral3: queries grow": (
        "ministral3",
        {"rope_parameters": GROWING},
        {"query_growth": None},
    ),
    "ministral3: and lie in a window": (
        "ministral3",
        {
            "sliding_window": 3,
            "rope_parameters": {**GROWING, "mscale": 1.0, "mscale_all_dim": 0.0, "truncate": False},
        },
        {"rope_stretch": None},
    ),
    "phi3: LongRoPE of a part of each head": (
        "phi3",
        {},
        {"rotary_dim": None, "rope_stretch": None},
    ),
    "phi3: short enough for the short divisors": (
        "phi3",
        {"original_max_position_embeddings": 16},
        {"rope_theta": 1e4},
    ),
    "phi3: tied, in a window": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default"},
            "tie_word_embeddings": True,
            "sliding_window": 3,
        },
        {"rotary_dim": None},
    ),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}, {"activation": "gelu_tanh"}),
    "qwen2: the last two layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        {"sliding": (False,) * 4},
    ),
    "qwen3: large heads": ("qwen3", {"head_dim": 16}, {"tied": True}),
    "qwen3: biases, every other layer slides": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": [FULL, SLIDING] * 2,
        },
        {"attention_scale": 1.0},
    ),
    "qwen3_moe: shares as they are, q/k norms": ("qwen3_moe", {}, {"normalised_shares": True}),
    "qwen3_moe: shares that sum to one, tied, biases, in a window": (
        "qwen3_moe",
        {
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "tie_word_embeddings": True,
        },
        {"normalised_shares": False},
    ),
    "mixtral: two of five experts": ("mixtral", {}, {"experts_per_token": 3}),
    "mixtral: one expert, in a window": (
        "mixtral",
        {"num_experts_per_tok": 1, "sliding_window": 3},
        {"sliding": (False,) * 4},
    ),
    "smollm3: layers without positions": ("smollm3", {}, {"rotated": (True, True, True, False)}),
    "smollm3: untied, biases, a window where positions are missing": (
        "smollm3",
        {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
        },
        {"sliding": (False,) * 4},
    ),
    "qwen3: YaRN": ("qwen3", STRETCHED_BY_YARN, {"rope_stretch": None}),
    "olmo2: no norms before": (
        "olmo2",
        {"num_key_value_heads": 4, "head_dim": 4},
        {"norm_offset": 1.0},
    ),
    "olmo2: biases, tied, stretched": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, **STRETCHED},
        {"rope_stretch": None},
    ),
    "olmo3: three layers slide": ("olmo3", {"sliding_window": 3}, {"sliding": (False,) * 4}),
    "olmo3: YaRN, but not where it slides": (
        "olmo3",
        {
            "layer_types": [FULL, SLIDING] * 2,
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 50.0}},
        },
        {"rope_theta_sliding": None},
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def apply(tiny):
    return quick_jit(tiny[1].apply)


@pytest.fixture(scope="module")
def hidden(tiny):
    return quick_jit(tiny[1].hidden)


def load_tiny(folder, family="gemma3_text", **overrides):
    """(transformers' model, ours with scanned layers, parameters); a scan compiles faster than
    layers laid out."""
    hf = tiny_hf(family, **overrides)
    model, params = carry_over(hf, folder)
    return hf, model, params


def assert_close(ours, reference, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(ours), np.asarray(reference), rtol=tolerance, atol=tolerance
    )


def silenced_after(params, n_layers):
    """Parameters with which the later layers change nothing."""

    def silence(path, leaf):
        if not path.startswith("layers/"):
            return leaf
        later = np.array(stacks.numbers(path, leaf.shape[0])) >= n_layers
        adds = any(
            name in path for name in ("o_proj", "down_proj", "down_experts", "per_layer/proj")
        )
        if not adds and "layer_scalar" not in path:
            return leaf
        leaf = np.array(leaf)  # in JAX each number of layers would compile a program a shape
        leaf[later] = 0.0 if adds else 1.0
        return leaf

    return trees.map_with_path(silence, params)


@pytest.mark.parametrize("name", SWITCHES)
def test_each_layer_and_the_logits_equal_transformers(name, tmp_path):
    family, overrides, undone = SWITCHES[name]
    hf, model, params = load_tiny(tmp_path, family, **overrides)
    assert model.config.family == family
    tokens = random_tokens(1, (2, 16), 101)
    with torch.no_grad():
        reference = hf(torch.tensor(np.asarray(tokens)).long(), output_hidden_states=True)
        # Of the states after layers 1, 2, 3 ... transformers normalises only the last one.
        after_layer = [hf.model.norm(h) for h in reference.hidden_states[1:-1]] + [
            reference.hidden_states[-1]
        ]
    hidden = quick_jit(lambda params: model.hidden(params, tokens)[0])
    for n_layers, expected in enumerate(after_layer, 1):
        assert_close(hidden(silenced_after(params, n_layers)), expected)
    logits = model.logits(params, hidden(params))
    assert logits.dtype == jnp.float32
    assert_close(logits, reference.logits)
    if undone:  # the switch matters here: with it the other way the same check fails
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **undone))
        assert jnp.max(jnp.abs(quick_jit(other.apply)(params, tokens) - logits)) > 1e-3


def stored_form(family, name, parameter):
    """Yields `(name, tensor)` as a file has a parameter that transformers holds in memory, where
    experts are joined."""
    if ".mlp.experts." not in name:
        yield (
            name.replace(
                ".mlp.gate.", ".block_sparse_moe.gate." if family == "mixtral" else ".mlp.gate."
            ),
            parameter,
        )
        return
    block, _, joined = name.partition(".mlp.experts.")
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[joined]
    block += ".mlp" if family == "qwen3_moe" else ".block_sparse_moe"
    mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for e, expert in enumerate(parameter):
        for of, part in zip(names, expert.chunk(len(names)), strict=True):
            yield f"{block}.experts.{e}.{of if family == 'qwen3_moe' else mixtral[of]}.weight", part


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_parameters_equal_torch(family, tmp_path):
    hf, model, params = load_tiny(tmp_path, family)
    tokens = random_tokens(2, (2, 16), 101)
    ids = torch.tensor(np.asarray(tokens)).long()
    torch.nn.functional.cross_entropy(
        hf(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).backward()

    @jax.grad
    def gradient(params):
        log_p = jax.nn.log_softmax(model.apply(params, tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).sum()

    theirs = {
        as_stored: grad
        for name, p in hf.named_parameters()
        for as_stored, grad in stored_form(family, name, p.grad)
    }
    ours = dict(hf_tensors(quick_jit(gradient)(params), TABLES[family]))
    # which do not train
    theirs |= {
        name: torch.zeros_like(buffer) for name, buffer in hf.named_buffers() if name in ours
    }
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert_close(grad, theirs[name], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_compiles_on_a_cpu_where_xla_no_longer_widens_it(family, tmp_path):
    _, model, _ = load_tiny(tmp_path, family)
    low = dataclasses.replace(model, dtype=jnp.bfloat16)

    def gradient(params):
        return jax.grad(lambda p: low.apply(p, random_tokens(2, (2, 8), 101)).sum())(params)

    jax.jit(gradient, compiler_options=compiler_options("cpu")).lower(
        low.abstract_params()
    ).compile()


def test_scores_with_a_cap_are_not_cudnns(tmp_path):
    _, model, params = load_tiny(tmp_path, "gemma2")
    with pytest.raises(UserError, match="does not cap scores"):
        dataclasses.replace(model, attention="cudnn").apply(params, random_tokens(0, (1, 4), 101))


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_bfloat16_is_as_close_to_float32_as_in_torch(family, tmp_path):
    hf, model, params = load_tiny(tmp_path, family)
    tokens = random_tokens(3, (16, 16), 101)  # in a few tokens chance decides
    exact = hf_logits(hf, tokens)
    theirs = hf_logits(tiny_hf(family).to(torch.bfloat16), tokens)
    in_bfloat16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = quick_jit(dataclasses.replace(model, dtype=jnp.bfloat16).apply)(in_bfloat16, tokens)
    assert logits.dtype == jnp.float32
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 1.2 * np.sqrt(np.mean((theirs - exact) ** 2))


def empty_cache(model: Decoder, batch: int, slots: int) -> Cache:
    """Full of nonsense, so that a slot which is read too early shows."""
    return jax.tree.map(
        lambda block: jnp.full(block.shape, 7.0, block.dtype), model.cache_shapes(batch, slots)
    )


def write(model: Decoder, cache: Cache, new: Cache, positions_BxT: jax.Array) -> Cache:
    if positions_BxT.shape[1] == 1:
        return caches.written(cache, new, positions_BxT[:, 0])
    ends = positions_BxT[:, 0], positions_BxT[:, -1] + 1
    return caches.extended(model.config, cache, new, *ends, caches.longest(cache))


@pytest.mark.parametrize("chunks", [(1,) * 16, (8,) + (1,) * 8, (4, 8, 4)], ids=str)
def test_cached_decoding_equals_the_full_forward(tiny, apply, hidden, chunks):
    """Token by token, prefill then token by token, and prefill in chunks: each past the window of
    five."""
    _, model, params = tiny
    tokens = random_tokens(4, (2, sum(chunks)), 101)
    expected = apply(params, tokens)
    cache, start = empty_cache(model, 2, 20), 0
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        h, new = hidden(params, tokens[:, start : start + size], positions, past=cache)
        cache = write(model, cache, new, positions)
        assert_close(model.logits(params, h), expected[:, start : start + size])
        start += size


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma4_text", {}),
        ("gemma4_text", {**KEYS_AS_VALUES, "sliding_window": 3}),
        ("gemma2", {}),
        ("llama", STRETCHED),
        ("mistral", {"sliding_window": 3}),
        ("ministral3", {}),
        ("phi3", {"original_max_position_embeddings": 32}),
        ("qwen3_moe", {}),
        ("mixtral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
        ("qwen3", {}),
        ("olmo2", {}),
        ("olmo3", {"sliding_window": 3}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 3}),
    ],
)
def test_cached_decoding_equals_the_full_forward_in_every_family(family, overrides, tmp_path):
    _, model, params = load_tiny(tmp_path, family, **overrides)
    hidden = quick_jit(model.hidden)
    tokens = random_tokens(4, (2, 14), 101)
    expected = quick_jit(model.apply)(params, tokens)
    cache, start = empty_cache(model, 2, 20), 0
    for size in (7,) + (1,) * 7:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        h, new = hidden(params, tokens[:, start : start + size], positions, past=cache)
        cache = write(model, cache, new, positions)
        assert_close(model.logits(params, h), expected[:, start : start + size])
        start += size


def test_rows_of_different_length_decode_from_one_cache(tiny, apply, hidden):
    _, model, params = tiny
    lengths, steps = jnp.array([3, 8]), 8
    tokens = random_tokens(5, (2, 8 + steps), 101)
    expected = apply(params, tokens)
    _, cache = hidden(params, tokens[:, :8])  # row 0 is prefilled beyond its length: padding
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 12), (0, 0), (0, 0))), cache)
    for step in range(steps):
        positions = (lengths + step)[:, None]
        h, new = hidden(
            params, jnp.take_along_axis(tokens, positions, axis=1), positions, past=cache
        )
        cache = write(model, cache, new, positions)
        assert_close(
            model.logits(params, h)[:, 0],
            jnp.take_along_axis(expected, positions[..., None], axis=1)[:, 0],
        )


def test_packed_sequences_do_not_see_each_other(tiny, hidden):
    params = tiny[2]
    lengths = (7, 1, 8)  # on either side of the window
    rows = random_tokens(0, (3, 8), 101)  # padded at their end, which no earlier token sees
    alone, _ = hidden(params, rows)
    separate = jnp.concatenate([alone[i, :n] for i, n in enumerate(lengths)])
    packed = jnp.concatenate([rows[i, :n] for i, n in enumerate(lengths)])[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.repeat(jnp.arange(3), jnp.array(lengths))[None]
    assert_close(hidden(params, packed, positions, segments)[0][0], separate)
    leaking = hidden(params, packed, positions, jnp.zeros_like(segments))[0][0]
    assert jnp.max(jnp.abs(leaking - separate)) > 1e-2


def test_a_token_changes_no_earlier_logits_and_none_beyond_the_windows(tiny):
    _, model, params = tiny
    cfg = dataclasses.replace(model.config, sliding=(True,) * 4, window=3)
    logits = quick_jit(dataclasses.replace(model, config=cfg).apply)
    tokens = random_tokens(6, (1, 24), 101)
    changed = logits(params, tokens.at[0, 5].add(1)) - logits(params, tokens)
    seen = np.flatnonzero(np.abs(np.asarray(changed[0])).max(axis=-1) > 0)
    # each layer reaches window - 1 further
    assert seen.tolist() == list(range(5, 5 + 4 * (3 - 1) + 1))


def test_unrolling_and_remat_change_neither_loss_nor_gradient(tiny):
    _, model, params = tiny
    tokens = random_tokens(7, (2, 16), 101)

    def value_and_grad(unroll, remat):
        variant = dataclasses.replace(model, unroll=unroll, remat=remat)

        def loss(params):
            return jnp.mean(jax.nn.log_softmax(variant.apply(params, tokens))[..., 3])

        return quick_jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad(unroll=False, remat="none")
    for unroll, remat in ((True, "none"), (False, "full"), (False, "dots")):
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), value_and_grad(unroll, remat), expected)


def test_init_is_what_abstract_params_and_axes_say(tiny):
    _, model, _ = tiny
    params = quick_jit(model.init)(jax.random.key(0))

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(params) == describe(model.abstract_params())
    axes = trees.flatten(model.axes())
    assert {path: len(names) for path, names in axes.items()} == {
        p: x.ndim for p, x in trees.flatten(params).items()
    }
    assert all(names[0] == "layers" for path, names in axes.items() if path.startswith("layers/"))
    layers = params["layers"]["attn"]["q_proj"]["kernel"]
    assert jnp.max(jnp.abs(layers[0] - layers[1])) > 0.1  # each layer draws its own


def test_a_fresh_model_guesses_nearly_evenly(tiny, apply):
    params = quick_jit(tiny[1].init)(jax.random.key(0))
    log_p = jax.nn.log_softmax(apply(params, random_tokens(8, (2, 16), 101)))
    assert abs(-float(log_p.mean()) - np.log(101)) < 1.0
