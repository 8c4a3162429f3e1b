from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kafjax.ops.loss import chunked_cross_entropy, even_chunk, summed_and_single_losses, used

N, D, V = 21, 8, 40


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((N, D)).astype(np.float32)
    embedding = rng.standard_normal((V, D)).astype(np.float32)
    targets = rng.integers(0, V, N).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], N).astype(np.float32)
    return tuple(map(jnp.asarray, (hidden, embedding, targets, weights)))


def plain(hidden, embedding, targets, weights, cap=None):
    logits = hidden @ embedding.T if cap is None else cap * jnp.tanh(hidden @ embedding.T / cap)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


@pytest.mark.parametrize(
    ("chunk", "cap"), [(4, None), (7, None), (21, None), (256, None), (7, 1.5)]
)
def test_equals_plain_cross_entropy_and_its_gradients(inputs, chunk, cap):
    def chunked(*args):  # the 3: a cotangent that is not 1
        return 3 * chunked_cross_entropy(*args, chunk=chunk, cap=cap)

    def reference(*args):
        return 3 * plain(*args, cap)

    value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*inputs)
    expected, expected_gradients = jax.value_and_grad(reference, argnums=(0, 1))(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_frozen_embedding_gives_the_same_hidden_gradient_without_a_vocabulary_sized_one(inputs):
    gradient = jax.grad(lambda h, *rest: chunked_cross_entropy(h, *rest, chunk=7))
    np.testing.assert_allclose(gradient(*inputs), jax.grad(plain)(*inputs), rtol=1e-4, atol=1e-5)

    def is_jaxpr(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def results(jaxpr):
        for equation in jaxpr.eqns:
            yield from (
                variable.aval.shape
                for variable in equation.outvars
                if equation.primitive.name == "dot_general"
            )
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    yield from results(getattr(value, "jaxpr", value))

    shapes = list(results(jax.make_jaxpr(gradient)(*inputs).jaxpr))
    assert (7, V) in shapes  # the logits of a chunk, so the walk finds what it looks for
    assert (V, D) not in shapes and (D, V) not in shapes
    trained = jax.grad(lambda *args: chunked_cross_entropy(*args, chunk=7), argnums=(0, 1))
    assert {(V, D), (D, V)} & set(results(jax.make_jaxpr(trained)(*inputs).jaxpr))


def test_weight_zero_masks_a_place_out(inputs):
    hidden, embedding, targets, weights = inputs
    masked = weights.at[5].set(0.0)

    def loss(h, t):
        return chunked_cross_entropy(h, embedding, t, masked, chunk=8)

    gradient = jax.grad(loss)(hidden, targets)
    assert not gradient[5].any()
    assert loss(hidden, targets) == loss(
        hidden.at[5].add(1.0), targets.at[5].set((targets[5] + 1) % V)
    )


def test_vmap_over_shares_adds_up(inputs):
    hidden, embedding, targets, weights = (x[:20] if x.shape[0] == N else x for x in inputs)

    def shares(hidden, embedding):
        split = (x.reshape(4, 5, *x.shape[1:]) for x in (hidden, targets, weights))
        return jnp.sum(
            jax.vmap(lambda h, t, w: chunked_cross_entropy(h, embedding, t, w, chunk=2))(*split)
        )

    value, gradients = jax.value_and_grad(shares, argnums=(0, 1))(hidden, embedding)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(
        hidden, embedding, targets, weights
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float32(inputs):
    hidden, embedding, targets, weights = inputs

    def loss(h, e):
        return chunked_cross_entropy(h, e, targets, weights, chunk=8)

    value, (d_hidden, d_embedding) = jax.value_and_grad(loss, argnums=(0, 1))(
        hidden.astype(jnp.bfloat16), embedding
    )
    expected, expected_gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)
    assert (value.dtype, d_hidden.dtype, d_embedding.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for ours, theirs in zip((d_hidden, d_embedding), expected_gradients, strict=True):
        theirs = np.asarray(theirs)
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 2e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("chunk", [4, 256])
def test_single_losses_are_told_beside_their_sum_and_have_no_gradient(inputs, chunk):
    hidden, embedding, targets, weights = inputs
    total, losses = summed_and_single_losses(*inputs, chunk)
    expected = weights * optax.softmax_cross_entropy_with_integer_labels(
        hidden @ embedding.T, targets
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    assert float(total) == pytest.approx(float(losses.sum()), rel=1e-6)
    of_total = jax.grad(
        lambda h: summed_and_single_losses(h, embedding, targets, weights, chunk)[0]
    )(hidden)
    mixed = jax.grad(
        lambda h: sum(map(jnp.sum, summed_and_single_losses(h, embedding, targets, weights, chunk)))
    )(hidden)
    np.testing.assert_array_equal(mixed, of_total)


@pytest.mark.parametrize("n_targets", [0, 1, 4, 5, 13, N])
def test_empty_chunks_are_skipped_and_change_neither_loss_nor_gradients(inputs, n_targets):
    hidden, embedding, targets, weights = inputs
    weights = jnp.where(jnp.arange(N) < n_targets, weights + 0.25, 0)
    assert used(weights) == n_targets
    # Where nothing looks stands what would spoil every sum.
    n_computed = -(-n_targets // 4) * 4
    spoilt = jnp.where(jnp.arange(N)[:, None] < n_computed, hidden, jnp.nan)
    gradients_of = jax.jit(
        jax.value_and_grad(
            lambda h, e: chunked_cross_entropy(h, e, targets, weights, chunk=4), argnums=(0, 1)
        )
    )
    value, gradients = gradients_of(spoilt, embedding)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(
        hidden, embedding, targets, weights
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_shares_run_as_many_chunks_as_the_fullest_of_them(inputs):
    hidden, embedding, targets, weights = (x[:20] if x.shape[0] == N else x for x in inputs)
    weights = (weights + 1) * (jnp.arange(20) % 10 < jnp.where(jnp.arange(20) < 10, 3, 5))
    split = [x.reshape(2, 10, *x.shape[1:]) for x in (hidden, targets, weights)]
    n_used = used(split[2])

    def of_share(h, t, w):
        return chunked_cross_entropy(h, embedding, t, w, 2, n_used)

    assert n_used == 5
    np.testing.assert_allclose(
        jnp.sum(jax.vmap(of_share)(*split)), plain(hidden, embedding, targets, weights), rtol=1e-5
    )
    split[0] = split[0].at[:, 6:].set(jnp.nan)  # no chunk reads on
    assert np.isfinite(jax.vmap(of_share)(*split)).all()


@pytest.mark.parametrize("most", [1, 64, 256])
@pytest.mark.parametrize("n", [1, 32, 63, 64, 200, 448, 5000])
def test_chunks_are_even_and_no_larger_than_asked(n, most):
    size = even_chunk(n, most)
    assert 1 <= size <= most and size <= n
    assert size * -(-n // size) - n < -(-n // size)
    assert size == most or n < 128 or size <= max(-(-n // 4), 128)
