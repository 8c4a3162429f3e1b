"""The decoder against transformers on tiny random checkpoints of every family, and its paths against each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import carry_over, hf_logits, quick_jit, random_tokens, tiny_hf

from kafjax.core import trees
from kafjax.models import Cache, DecoderConfig

SLIDING, FULL = "sliding_attention", "full_attention"

# Half of the waves are kept or partly kept, the longer ones divided; 16 tokens are more than the original 12.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 1.0}
STRETCHED = {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 12, "rope_theta": 100.0}}
DIVIDED = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}

# Each switch of the configuration: what transformers is told, and the field here that has to carry it.
GEMMA_SWITCHES = {
    "biases and a head of its own": ({"attention_bias": True, "tie_word_embeddings": False}, {"tied": True}),
    "four query heads a key head, head size above hidden / heads": ({"num_key_value_heads": 1, "head_dim": 16}, None),
    "as many key heads as query heads, head size below": ({"num_key_value_heads": 4, "head_dim": 4}, None),
    "window of three": ({"sliding_window": 3}, {"window": 5}),
    "every layer slides": ({"layer_types": [SLIDING] * 4}, {"sliding": (True, False) * 2}),
    "no layer slides": ({"layer_types": [FULL] * 4}, {"sliding": (True, False) * 2}),
    "only the first layer is full, window of one": (
        {"layer_types": [FULL, SLIDING, SLIDING, SLIDING], "sliding_window": 1},
        {"sliding": (True, False) * 2},
    ),
    "other rotary bases": (
        {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 500.0}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}},
        {"rope_theta": 1e6, "rope_theta_sliding": 1e4},
    ),
    "positions divided by three": (
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}},
        {"rope_factor": 1.0},
    ),
    "another attention scale": ({"query_pre_attn_scalar": 3}, {"attention_scale": 8**-0.5}),
    "another epsilon": ({"rms_norm_eps": 0.1}, {"norm_eps": 1e-6}),
}
SWITCHES = {f"gemma: {name}": ("gemma3_text", *switch) for name, switch in GEMMA_SWITCHES.items()} | {
    "llama: stretched": ("llama", STRETCHED, {"rope_stretch": None}),
    "llama: biases, one large key head, another epsilon": (
        "llama",
        {"attention_bias": True, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 0.1},
        {"norm_eps": 1e-6},
    ),
    "llama: tied, positions divided": ("llama", {"tie_word_embeddings": True, **DIVIDED}, {"rope_factor": 1.0}),
    "mistral: window of three, positions divided": ("mistral", {"sliding_window": 3, **DIVIDED}, {"sliding": (False,) * 4}),
    "mistral: no window, small heads": ("mistral", {"sliding_window": None, "head_dim": 4}, {"norm_offset": 1.0}),
    "qwen2: tied": ("qwen2", {"tie_word_embeddings": True}, {"activation": "gelu_tanh"}),
    "qwen2: the last two layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        {"sliding": (False,) * 4},
    ),
    "qwen3: large heads": ("qwen3", {"head_dim": 16}, {"tied": True}),
    "qwen3: biases, every other layer slides": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3, "layer_types": [FULL, SLIDING] * 2},
        {"attention_scale": 1.0},
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
    """(transformers' model, ours with scanned layers, parameters); a scan compiles faster than layers laid out."""
    hf = tiny_hf(family, **overrides)
    model, params = carry_over(hf, folder)
    return hf, model, params


def assert_close(ours, reference, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(reference), rtol=tolerance, atol=tolerance)


def silenced_after(params, n_layers):
    """Parameters with which the later layers add nothing."""

    def silence(path, leaf):
        return leaf.at[n_layers:].set(0.0) if "o_proj" in path or "down_proj" in path else leaf

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
        after_layer = [hf.model.norm(h) for h in reference.hidden_states[1:-1]] + [reference.hidden_states[-1]]
    hidden = quick_jit(lambda params: model.hidden(params, tokens)[0])
    for n_layers, expected in enumerate(after_layer, 1):
        assert_close(hidden(silenced_after(params, n_layers)), expected)
    logits = model.logits(params, hidden(params))
    assert logits.dtype == jnp.float32
    assert_close(logits, reference.logits)
    if undone:  # the switch matters here: with it the other way the same check fails
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **undone))
        assert jnp.max(jnp.abs(quick_jit(other.apply)(params, tokens) - logits)) > 1e-3


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_gradient_equals_torch(family, tmp_path):
    hf, model, params = load_tiny(tmp_path, family)
    tokens = random_tokens(2, (2, 16), 101)
    ids = torch.tensor(np.asarray(tokens)).long()
    torch.nn.functional.cross_entropy(hf(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()

    @jax.grad
    def gradient(params):
        log_p = jax.nn.log_softmax(model.apply(params, tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).sum()

    grads = trees.flatten(quick_jit(gradient)(params))
    assert_close(grads["embed/embedding"], hf.model.embed_tokens.weight.grad, 1e-4)
    for i, layer in enumerate(hf.model.layers):
        assert_close(grads["layers/attn/q_proj/kernel"][i], layer.self_attn.q_proj.weight.grad.T, 1e-4)
        assert_close(grads["layers/attn_norm/scale"][i], layer.input_layernorm.weight.grad, 1e-4)
        assert_close(grads["layers/mlp/gate_proj/kernel"][i], layer.mlp.gate_proj.weight.grad.T, 1e-4)
        assert_close(grads["layers/mlp/down_proj/kernel"][i], layer.mlp.down_proj.weight.grad.T, 1e-4)
        if family == "gemma3_text":
            assert_close(grads["layers/attn/k_norm/scale"][i], layer.self_attn.k_norm.weight.grad, 1e-4)
            assert_close(grads["layers/mlp_post_norm/scale"][i], layer.post_feedforward_layernorm.weight.grad, 1e-4)
    if family == "llama":
        assert_close(grads["head/embedding"], hf.lm_head.weight.grad, 1e-4)


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


def empty_cache(cfg: DecoderConfig, batch: int, slots: int) -> Cache:
    """Full of nonsense, so that a slot which is read too early shows."""
    shape = (cfg.n_layers, batch, slots, cfg.n_kv_heads, cfg.head_dim)
    return {"k": jnp.full(shape, 7.0), "v": jnp.full(shape, -7.0)}


def write(cache: Cache, new: Cache, positions_BxT: jax.Array) -> Cache:
    rows = jnp.arange(positions_BxT.shape[0])[:, None]
    return jax.tree.map(lambda old, x: old.at[:, rows, positions_BxT].set(x), cache, new)


@pytest.mark.parametrize("chunks", [(1,) * 16, (8,) + (1,) * 8, (4, 8, 4)], ids=str)
def test_cached_decoding_equals_the_full_forward(tiny, apply, hidden, chunks):
    """Token by token, prefill then token by token, and prefill in chunks: each past the window of five."""
    _, model, params = tiny
    tokens = random_tokens(4, (2, sum(chunks)), 101)
    expected = apply(params, tokens)
    cache, start = empty_cache(model.config, 2, 20), 0
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        h, new = hidden(params, tokens[:, start : start + size], positions, past=cache)
        cache = write(cache, new, positions)
        assert_close(model.logits(params, h), expected[:, start : start + size])
        start += size


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", STRETCHED),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
        ("qwen3", {}),
    ],
)
def test_cached_decoding_equals_the_full_forward_in_every_family(family, overrides, tmp_path):
    _, model, params = load_tiny(tmp_path, family, **overrides)
    hidden = quick_jit(model.hidden)
    tokens = random_tokens(4, (2, 14), 101)
    expected = quick_jit(model.apply)(params, tokens)
    cache, start = empty_cache(model.config, 2, 20), 0
    for size in (7,) + (1,) * 7:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        h, new = hidden(params, tokens[:, start : start + size], positions, past=cache)
        cache = write(cache, new, positions)
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
        h, new = hidden(params, jnp.take_along_axis(tokens, positions, axis=1), positions, past=cache)
        cache = write(cache, new, positions)
        assert_close(model.logits(params, h)[:, 0], jnp.take_along_axis(expected, positions[..., None], axis=1)[:, 0])


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
    assert seen.tolist() == list(range(5, 5 + 4 * (3 - 1) + 1))  # each layer reaches window - 1 further


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
    assert {path: len(names) for path, names in axes.items()} == {p: x.ndim for p, x in trees.flatten(params).items()}
    assert all(names[0] == "layers" for path, names in axes.items() if path.startswith("layers/"))
    layers = params["layers"]["attn"]["q_proj"]["kernel"]
    assert jnp.max(jnp.abs(layers[0] - layers[1])) > 0.1  # each layer draws its own


def test_a_fresh_model_guesses_nearly_evenly(tiny, apply):
    params = quick_jit(tiny[1].init)(jax.random.key(0))
    log_p = jax.nn.log_softmax(apply(params, random_tokens(8, (2, 16), 101)))
    assert abs(-float(log_p.mean()) - np.log(101)) < 1.0
