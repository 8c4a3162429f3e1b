"""Run by test_multidevice.py in a process of its own, with eight fake devices: every mesh axis
alone, and what devices send each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.models import Decoder, DecoderConfig
from kafjax.parallel import make_mesh, n_data_shares, shard
from kafjax.parallel.hlo import Collective, collectives
from kafjax.training import Batches, Example, TrainConfig
from kafjax.training.demand import auto_mesh
from kafjax.training.step import TrainState, batch_sharding
from kafjax.training.task import Task

# Eight heads, so that any axis can take all eight devices.
CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    mlp_size=24,
    n_layers=3,
    n_heads=8,
    n_kv_heads=8,
    head_dim=4,
    sliding=(True, False, True),
    window=5,
)
MODEL = Decoder(CONFIG)
TRAIN = TrainConfig(
    batch_rows=8, seq_len=16, learning_rate=1e-3, freeze_embedding=False, weight_decay=0.1
)
# Four experts: fsdp splits them whole, tensor splits each.
EXPERTS = Decoder(
    dataclasses.replace(
        CONFIG, n_experts=4, experts_per_token=2, normalised_shares=True, post_norms=False
    )
)
# Full layers with wider heads, two layers that share the keys and values of the two before, and
# embeddings for each layer.
SHAPES = dataclasses.replace(
    CONFIG, n_layers=4, sliding=(True, False) * 2, full_head_dim=8, n_sharing=2, sharing_mlp_size=48
)
STACKS = Decoder(
    dataclasses.replace(
        SHAPES, per_layer_size=4, per_layer_vocab=64, value_norm=True, layer_scalar=True
    )
)
SPECS = ("data:8", "fsdp:8", "tensor:8", "sequence:8", "fsdp:2,sequence:2,tensor:2")
FLOAT = 4  # bytes


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 16, 24)
    return [
        Example(
            rng.integers(1, 64, n).astype(np.int32), (np.arange(n) >= n // 3).astype(np.float32)
        )
        for n in lengths
    ]


@dataclasses.dataclass(frozen=True)
class Stepped:
    """Two steps done on a mesh: what they left, what they told, and what the devices sent."""

    state: TrainState
    metrics: list[dict[str, Any]]
    sent: list[Collective]


def two_steps(
    mesh: Mesh, config: TrainConfig, params: trees.Tree, model: Decoder = MODEL
) -> Stepped:
    task = Task.full(model, params, config, mesh, 2)
    batches = Batches(
        [examples()],
        epochs=2,
        seq_len=config.seq_len,
        batch_rows=config.batch_rows,
        groups=n_data_shares(mesh),
    )
    program = task.lower(batches[0]).compile()
    state, metrics = task.new_state(), []
    for step in range(2):
        batch = shard(batches[step], batch_sharding(mesh))
        state, told = program(state, task.frozen, batch)
        metrics.append(jax.device_get(told))
    return Stepped(state, metrics, collectives(program.as_text()))


def equal(name: str, ours: Stepped, theirs: Stepped) -> None:
    """Losses, gradients (the moments are sums of them) and parameters of two steps.

    A single parameter may differ by more than float noise: where a gradient is nothing but noise,
    Adam moves by the full rate all the same.
    """
    for told, expected in zip(ours.metrics, theirs.metrics, strict=True):
        # places computed: a cost, of which each share has its own last chunk
        for key in expected.keys() - {"loss_places"}:
            np.testing.assert_allclose(
                told[key], expected[key], rtol=1e-4, err_msg=f"{name}: {key}"
            )

    def leaves(tree):
        return jax.tree_util.tree_leaves_with_path(jax.device_get(tree))

    for (path, leaf), (_, expected) in zip(
        leaves(ours.state.opt_state), leaves(theirs.state.opt_state), strict=True
    ):
        np.testing.assert_allclose(
            leaf, expected, rtol=1e-3, atol=1e-5, err_msg=f"{name}: {jax.tree_util.keystr(path)}"
        )
    for (path, leaf), (_, expected) in zip(
        leaves(ours.state.trainable), leaves(theirs.state.trainable), strict=True
    ):
        difference = np.abs(leaf - expected)
        assert difference.mean() < 2e-6 and difference.max() < TRAIN.learning_rate, (
            name,
            path,
            difference.mean(),
            difference.max(),
        )
    print(f"{name} equals one device", flush=True)


def total(
    sent: list[Collective], kind: str, chosen: Callable[[Collective], bool] = lambda c: True
) -> int:
    """Bytes that come out of the collectives of a kind on each device, all times."""
    return sum(c.times * c.n_bytes for c in sent if c.kind == kind and chosen(c))


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    assert jax.device_count() == 8
    params = jax.jit(MODEL.init)(jax.random.key(0))
    alone = make_mesh({}, devices=jax.devices()[:1])
    one = two_steps(alone, TRAIN, params)

    on = {spec: two_steps(make_mesh(spec), TRAIN, params) for spec in SPECS}
    for spec, stepped in on.items():
        equal(spec, stepped, one)
    what_is_sent(params, on)

    fsdp = on["fsdp:8"].state
    for name, tree in (("parameters", fsdp.trainable), ("moments", fsdp.opt_state)):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        assert bytes_on_a_device(tree) < 1.05 * whole / 8, name
    print("each device holds an eighth of parameters and optimizer state", flush=True)

    mixed = make_mesh("fsdp:4,tensor:2")
    for optimizer in ("adafactor", "muon"):
        config = dataclasses.replace(TRAIN, optimizer=optimizer)
        equal(optimizer, two_steps(mixed, config, params), two_steps(alone, config, params))

    of_experts = jax.jit(EXPERTS.init)(jax.random.key(0))
    equal("experts", *(two_steps(mesh, TRAIN, of_experts, EXPERTS) for mesh in (mixed, alone)))
    of_stacks = jax.jit(STACKS.init)(jax.random.key(0))
    # Many gradients of this model are nothing but noise: with the usual eps Adam would move those
    # by the full rate, either way.
    steady = dataclasses.replace(TRAIN, eps=1e-3)
    equal("stacks", *(two_steps(mesh, steady, of_stacks, STACKS) for mesh in (mixed, alone)))

    chosen_and_refused()


def what_is_sent(params: trees.Tree, on: dict[str, Stepped]) -> None:
    layers, ends = trees.partition(params, lambda path: path.startswith("layers/"))
    n_layers, one_layer = CONFIG.n_layers, trees.n_bytes(layers) // CONFIG.n_layers
    kernels = sum(
        leaf.nbytes for path, leaf in trees.flatten(layers).items() if path.endswith("/kernel")
    )
    activation = TRAIN.batch_rows * TRAIN.seq_len * CONFIG.hidden_size * FLOAT

    sent = on["data:8"].sent
    assert {c.kind for c in sent} == {"all-reduce"}, sent
    # All gradients once, those of the tied embedding for its two uses, and a few scalars.
    gradients = trees.n_bytes(params) + params["embed"]["embedding"].nbytes
    assert 0 <= total(sent, "all-reduce") - gradients < 64, (total(sent, "all-reduce"), gradients)
    print("data: gradients are added up once, and nothing else is sent", flush=True)

    sent = on["fsdp:8"].sent
    largest = max(c.largest for c in sent if c.kind == "all-gather")
    assert largest <= max(one_layer, trees.n_bytes(ends)), largest
    assert all(
        c.largest < one_layer for c in sent if c.kind == "all-gather" and c.times == n_layers
    )
    # Each kernel in the forward pass and again in the backward pass.
    gathered = total(sent, "all-gather", lambda c: c.times == n_layers and c.largest > 1024)
    assert gathered == 2 * kernels, (gathered, kernels)
    assert trees.n_bytes(params) <= total(sent, "all-reduce") < 1.1 * gradients, (
        total(sent, "all-reduce"),
        gradients,
    )
    print(
        "fsdp: a kernel is gathered at a time, twice a step, and gradients are added up once",
        flush=True,
    )

    sent = on["tensor:8"].sent
    assert {c.kind for c in sent} == {"all-reduce"}, sent
    # Forward: after attention and after the MLP. Backward: before q, k, v, gate and up, which XLA
    # does not add up first.
    of_activations = sum(c.times * (c.n_bytes // activation) for c in sent if c.times == n_layers)
    assert of_activations == (2 + 5) * n_layers, of_activations
    print(
        "tensor: no parameter is sent, and activations are added up 2 times a layer forward and 5 backward",
        flush=True,
    )


def chosen_and_refused() -> None:
    mesh, why = auto_mesh(MODEL, TRAIN)
    assert mesh.size == 8 and "of" in why and "meshes that divide" in why, why
    print("auto says why", flush=True)

    for spec, told in (
        (
            "data:2,fsdp:4,tensor:2",
            "is 16 devices, there are 8: choose sizes among its divisors 1, 2, 4, 8",
        ),
        ("tensor:7,fsdp:1", "divisors 1, 2, 4, 8"),
    ):
        try:
            make_mesh(spec)
        except UserError as error:
            assert told in str(error), error
        else:
            raise AssertionError(spec)
    odd = Decoder(dataclasses.replace(CONFIG, mlp_size=20))
    try:
        Task.full(odd, jax.eval_shape(odd.init, jax.random.key(0)), TRAIN, make_mesh("tensor:8"), 1)
    except UserError as error:
        assert "('mlp', size 20) does not divide over mesh axis tensor:8" in str(error), error
    else:
        raise AssertionError("mlp_size=20 does not divide over 8")
    print("what does not divide is named", flush=True)


if __name__ == "__main__":
    main()
