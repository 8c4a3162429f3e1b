"""Adapters in PEFT's format against the real `peft`: made there and read here, made here and read
there, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import FAMILIES, carry_over, hf_logits, quick_jit, random_tokens, tiny_hf

from kafjax import hub, lora
from kafjax.core.errors import UserError
from kafjax.lora import Spec

TOKENS = random_tokens(0, (2, 9), 101)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What `peft.LoraConfig` is made with, and what is to come of it here.
THEIRS = {
    "plain": dict(r=4, lora_alpha=7, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "all-linear": dict(r=2, target_modules="all-linear", use_rslora=True),
    "dora": dict(r=3, lora_alpha=9, target_modules=ALL, use_dora=True, layers_to_transform=[0, 2]),
    "regex": dict(r=3, target_modules=r"model\.layers\.[13]\.(self_attn\.o|mlp\.up)_proj"),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["self_attn.q_proj", "down_proj", "model.layers.1.mlp.up_proj"],
        rank_pattern={
            "layers.2.self_attn.q_proj": 2,
            "down_proj": 5,
            r"layers\.\d+\.self_attn\.q_proj": 3,
        },
        alpha_pattern={r".*layers\.[01]\.mlp\.down_proj": 2.5, "up_proj": 1},
    ),
    "one layer, without": dict(
        r=2,
        target_modules=ALL,
        layers_to_transform=1,
        layers_pattern="layers",
        exclude_modules=["mlp.up_proj"],
    ),
    "saved": dict(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["model.norm", "post_attention_layernorm", "gate_proj"],
    ),
    "gaussian": dict(r=2, target_modules=["k_proj"], init_lora_weights="gaussian"),
    "pissa": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"
    ),
    "olora": dict(
        r=3,
        lora_alpha=5,
        target_modules=["k_proj", "o_proj"],
        init_lora_weights="olora",
        use_rslora=True,
    ),
    "pissa dora": dict(
        r=2,
        target_modules=["v_proj"],
        init_lora_weights="pissa",
        use_dora=True,
        rank_pattern={"layers.1.self_attn.v_proj": 3},
    ),
}
OURS = {
    "plain": Spec(rank=4, alpha=7.0, targets="(q|v)_proj", dropout=0.25),
    "all-linear": Spec(rank=2, alpha=3.0, targets="all-linear", rslora=True),
    "attention": Spec(rank=3, targets="attention", layers=(1, 2)),
    "mlp": Spec(rank=3, targets="mlp", layers=(0,)),
    "dora": Spec(rank=2, targets="(q|up)_proj", dora=True, rslora=True, rank_pattern={"up": 5}),
    "patterns": Spec(
        rank=4,
        alpha=6.0,
        targets="q_proj|layers/1/mlp|down",
        rank_pattern={"layers/2/": 2, "q": 3},
        alpha_pattern={"layers/[01]/mlp": 2.5},
    ),
    "saved": Spec(rank=2, targets="q_proj", trained=r"final_norm|attn_norm|gate_proj"),
    "pissa": Spec(
        rank=4, alpha=9.0, targets="k_proj|down", init="pissa", rank_pattern={"layers/0/": 2}
    ),
    "olora": Spec(rank=3, targets="(q|v)_proj", init="olora", rslora=True, dora=True),
}
ROWS = sorted({int(i) for i in TOKENS[0, 1:5]})
TABLES = {  # beside the embedding and the head, which are one in Gemma and two in Qwen 2.5
    ("gemma3_text", "embedding"): dict(
        r=3, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    ),
    ("gemma3_text", "embedding in full"): dict(
        r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    ("gemma3_text", "token rows"): dict(
        r=3, target_modules=["q_proj"], trainable_token_indices=ROWS
    ),
    ("qwen2", "embedding and head"): dict(
        r=3, target_modules=["embed_tokens", "lm_head", "v_proj"], rank_pattern={"lm_head": 2}
    ),
    ("qwen2", "embedding with dora"): dict(
        r=3, target_modules=["embed_tokens", "v_proj"], use_dora=True
    ),
    ("qwen2", "head in full"): dict(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    ("qwen2", "token rows"): dict(
        r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROWS}
    ),
}
OUR_TABLES = {
    ("gemma3_text", "embedding"): Spec(
        rank=3, targets="embed|q_proj", alpha_pattern={"embed": 1.5}
    ),
    ("gemma3_text", "embedding in full"): Spec(rank=3, targets="q_proj", trained="^embed/"),
    ("gemma3_text", "token rows"): Spec(rank=3, targets="q_proj", token_rows=tuple(ROWS[::-1])),
    ("qwen2", "embedding and head"): Spec(
        rank=3, targets="embedding|(k|up)_proj", rank_pattern={"head": 2}
    ),
    ("qwen2", "embedding with dora"): Spec(rank=3, targets="embed/|q_proj", dora=True),
    ("qwen2", "head in full"): Spec(rank=3, targets="q_proj", trained="head"),
    ("qwen2", "token rows"): Spec(rank=3, targets="q_proj", token_rows=tuple(ROWS)),
}
MAIN = ("gemma3_text", "qwen2")  # tied and with other norms; untied and with biases


def cases(kernels: dict, tables: dict) -> list:
    """Every case with two families, the common ones with the others."""
    # PEFT has no DoRA of experts, and joins their projections
    of = {"qwen3_moe": ("plain",), "mixtral": ("plain",)}
    common = ("plain", "dora", "patterns")
    families = [family for family in FAMILIES if family != "phi3"]  # see below
    chosen = [
        (f, c, kernels[c]) for f in families for c in kernels if f in MAIN or c in of.get(f, common)
    ]
    return [
        pytest.param(f, case, id=f"{f}, {name}")
        for f, name, case in [*chosen, *((*key, case) for key, case in tables.items())]
    ]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family)`: folder, model and parameters of a tiny random base, and its compiled
    logits."""

    @functools.cache
    def base(family: str):
        folder = tmp_path_factory.mktemp(family)
        model, params = carry_over(tiny_hf(family), folder)
        return folder, model, params, quick_jit(model.apply)

    return base


def theirs(family: str, **config) -> peft.PeftModel:
    """A `peft` model with everything random that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, about tied weights and about PiSSA
        model = peft.get_peft_model(tiny_hf(family), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def read_there(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) adapter keys.*")
        return peft.PeftModel.from_pretrained(tiny_hf(family), folder).eval()


def random_adapter(spec: Spec, params, seed: int = 0) -> tuple[lora.Adapters, Spec]:
    """Returns an adapter of `spec`, moved at random from its start; PiSSA and OLoRA are made
    plain."""
    if spec.changes_base or spec.dora or spec.trained or spec.token_rows:
        initial = quick_jit(lambda params: lora.init(spec, params, jax.random.key(seed)))(params)
    else:  # starts where it will; quicker
        initial = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, np.float32), lora.abstract(spec, params)
        )
    rng, rank = np.random.default_rng(seed), lora.ranks(spec, params)

    def moved(path: str, name: str, array: jax.Array) -> jax.Array:
        noise = 0.2 * rng.standard_normal(array.shape, np.float32)
        if path in rank and name in ("a", "b"):
            own = np.arange(rank[path].max()) < rank[path][..., None]
            noise = noise * (own[..., None, :] if name == "a" else own[..., :, None])
        return array + noise

    trained = {
        path: {name: moved(path, name, array) for name, array in parts.items()}
        for path, parts in initial.items()
    }
    return lora.plain(params, trained, initial, spec)


def merged(params, adapters: lora.Adapters, spec: Spec):
    def merge(params, adapters):
        return lora.merge(params, adapters, spec)

    # op by op, lengths of columns compile for seconds
    return (quick_jit(merge) if spec.dora else merge)(params, adapters)


def same_effect(one: Spec, other: Spec, params) -> None:
    """Ranks and alphas of every layer, and what else makes the update, are the same."""
    for resolve in (lora.ranks, lora.alphas, lora.scales):
        jax.tree.map(np.testing.assert_array_equal, resolve(one, params), resolve(other, params))
    assert lora.trained(one, params).keys() == lora.trained(other, params).keys()
    for field in ("rslora", "dora", "dropout", "rank", "alpha", "init"):
        assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize(("family", "case"), cases(THEIRS, TABLES))
def test_made_there_read_here(bases, tmp_path, family, case):
    _, model, params, apply = bases(family)
    reference = theirs(family, **case)
    reference.save_pretrained(tmp_path)
    adapters, spec = hub.load_peft(tmp_path, model, params)
    expected = hf_logits(reference, TOKENS)
    np.testing.assert_allclose(
        apply(merged(params, adapters, spec), TOKENS), expected, atol=1e-4, rtol=0
    )
    assert np.abs(apply(params, TOKENS) - expected).max() > 0.01


@pytest.mark.parametrize(("family", "case"), cases(OURS, OUR_TABLES))
def test_made_here_read_there_and_back(bases, tmp_path, family, case):
    _, model, params, apply = bases(family)
    adapters, spec = random_adapter(case, params)
    hub.save_peft(tmp_path / "adapter", adapters, spec, model, params, base_name="some/base")
    expected = apply(merged(params, adapters, spec), TOKENS)
    np.testing.assert_allclose(
        hf_logits(read_there(family, tmp_path / "adapter"), TOKENS), expected, atol=1e-4, rtol=0
    )
    assert np.abs(apply(params, TOKENS) - expected).max() > 0.01

    back, read = hub.load_peft(tmp_path / "adapter", model, params)
    same_effect(read, spec, params)
    for path, own in lora.ranks(spec, params).items():
        for name in ("a", "b"):
            np.testing.assert_array_equal(back[path][name], adapters[path][name])
        if spec.dora:
            lengths = (np.asarray(of[path]["magnitude"])[own > 0] for of in (back, adapters))
            np.testing.assert_array_equal(*lengths)
    for path in set(adapters) - set(lora.ranks(spec, params)):  # in full, or rows
        jax.tree.map(np.testing.assert_array_equal, back[path], adapters[path])


BOTH = st.sampled_from(MAIN)
NAMES = st.lists(
    st.sampled_from(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    min_size=1,
    unique=True,
)
LAYERS = st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True).map(tuple)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=BOTH,
    names=NAMES,
    layers=LAYERS,
    rank=st.integers(1, 8),
    alpha=st.floats(0.5, 64),
    ranks=st.dictionaries(
        st.sampled_from(("layers/0/", "layers/3/attn", "q_proj", "proj")),
        st.integers(1, 8),
        max_size=2,
    ),
    alphas=st.dictionaries(
        st.sampled_from(("layers/[12]/", "mlp", "kernel")), st.floats(0.5, 64), max_size=2
    ),
    rslora=st.booleans(),
)
def test_any_ranks_and_targets_survive(
    bases, tmp_path_factory, family, names, layers, rank, alpha, ranks, alphas, rslora
):
    _, model, params, _ = bases(family)
    spec = Spec(
        rank=rank, alpha=alpha, targets=f"({'|'.join(names)})", layers=layers, rslora=rslora
    )
    # those that mean none of the targets are an error
    for field, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        targets = [
            name
            for path, own in lora.ranks(spec, params).items()
            for name in explicit_names(path, own)
        ]
        found = {
            pattern: value
            for pattern, value in patterns.items()
            if any(re.search(pattern, name) for name in targets)
        }
        spec = dataclasses.replace(spec, **{field: found})
    folder = tmp_path_factory.mktemp("any") / "adapter"
    adapters, _ = random_adapter(spec, params)
    hub.save_peft(folder, adapters, spec, model, params)
    back, read = hub.load_peft(folder, model, params)
    same_effect(read, spec, params)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.use_rslora) == (rank, alpha, rslora)


def explicit_names(path: str, own: np.ndarray) -> list[str]:
    return [path, *(path.replace("layers", f"layers/{i}", 1) for i in range(len(own)) if own[i])]


JOINED = {
    "all": dict(
        r=4,
        lora_alpha=7,
        target_modules=["qkv_proj", "gate_up_proj", "down_proj"],
        layers_to_transform=[1, 3],
    ),
    "dora": dict(
        r=3,
        target_modules="all-linear",
        use_dora=True,
        use_rslora=True,
        rank_pattern={"layers.2.self_attn.qkv_proj": 2},
    ),
    "saved": dict(r=2, target_modules=["qkv_proj"], modules_to_save=["gate_up_proj"]),
}
APART = {
    "queries and values": Spec(rank=4, alpha=7.0, targets="(q|v)_proj", layers=(0, 2)),
    "every projection": Spec(
        rank=3,
        alpha=5.0,
        rank_pattern={"k_proj": 2, "layers/1/mlp/up": 1},
        alpha_pattern={"v_proj": 1.0},
    ),
    "rslora and dora": Spec(rank=2, rslora=True, dora=True, rank_pattern={"v_proj": 3}),
    "saved": Spec(rank=2, targets="o_proj", trained="(gate|up)_proj"),
}


@pytest.mark.parametrize("case", JOINED)
def test_modules_that_are_joined_there_and_apart_here(bases, tmp_path, case):
    """And written again as they came."""
    _, model, params, apply = bases("phi3")
    reference = theirs("phi3", **JOINED[case])
    reference.save_pretrained(tmp_path / "theirs")
    adapters, spec = hub.load_peft(tmp_path / "theirs", model, params)
    expected = hf_logits(reference, TOKENS)
    np.testing.assert_allclose(
        apply(merged(params, adapters, spec), TOKENS), expected, atol=1e-4, rtol=0
    )
    assert np.abs(apply(params, TOKENS) - expected).max() > 0.01
    hub.save_peft(tmp_path / "ours", adapters, spec, model, params)
    files = [
        safetensors.numpy.load_file(tmp_path / whose / "adapter_model.safetensors")
        for whose in ("theirs", "ours")
    ]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        np.testing.assert_array_equal(files[1][name], tensor, err_msg=name)


@pytest.mark.parametrize("case", APART)
def test_modules_that_came_to_differ_are_joined_in_blocks(bases, tmp_path, case):
    _, model, params, apply = bases("phi3")
    adapters, spec = random_adapter(APART[case], params)
    hub.save_peft(tmp_path / "adapter", adapters, spec, model, params)
    expected = apply(merged(params, adapters, spec), TOKENS)
    np.testing.assert_allclose(
        hf_logits(read_there("phi3", tmp_path / "adapter"), TOKENS), expected, atol=1e-4, rtol=0
    )
    back, read = hub.load_peft(tmp_path / "adapter", model, params)
    # products of joined factors round in another order: 1e-5 of the largest logit
    np.testing.assert_allclose(
        apply(merged(params, back, read), TOKENS),
        expected,
        atol=1e-5 * float(np.abs(expected).max()),
        rtol=0,
    )


def test_what_joined_modules_have_no_form_for_is_refused(bases, tmp_path):
    _, model, params, _ = bases("phi3")
    for told, spec in (
        (
            "takes a part of 'model.layers.0.mlp.gate_up_proj'",
            Spec(rank=2, targets="q_proj", trained="gate_proj"),
        ),
        (
            "DoRA of a part of 'model.layers.0.self_attn.qkv_proj'",
            Spec(rank=2, targets="q_proj", dora=True),
        ),
    ):
        with pytest.raises(UserError, match=told):
            hub.save_peft(tmp_path / "new", *random_adapter(spec, params), model, params)
        assert not (tmp_path / "new").exists()
    theirs("phi3", r=2, target_modules=["qkv_proj"]).save_pretrained(tmp_path / "cut")
    rewrite(
        tmp_path / "cut",
        lambda t: {name: x[:-1] if "qkv_proj.lora_B" in name else x for name, x in t.items()},
    )
    assert "has shape [63, 2], this base asks for 64 rows" in refused(
        bases, tmp_path / "cut", "phi3"
    )
    theirs("phi3", r=2, target_modules=["qkv_proj"], init_lora_weights="pissa").save_pretrained(
        tmp_path / "pissa"
    )
    with pytest.raises(UserError, match="'pissa' of joined modules"):
        hub.load_peft(tmp_path / "pissa", model, params)


def test_written_configs_are_short(bases, tmp_path):
    """Names as a user of PEFT would write them, where they suffice."""
    _, model, params, _ = bases("llama")
    spec = Spec(rank=4, alpha=8.0, targets="attention", layers=(1, 3), rank_pattern={"q_proj": 2})
    hub.save_peft(
        tmp_path / "a", random_adapter(spec, params)[0], spec, model, params, base_name="org/base"
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and config[
        "layers_to_transform"
    ] == [1, 3]
    assert config["rank_pattern"] == {"q_proj": 2} and config["alpha_pattern"] == {}
    assert (
        config["base_model_name_or_path"] == "org/base"
        and config["peft_type"] == "LORA"
        and config["task_type"] == "CAUSAL_LM"
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_base_and_adapter_in_several_shards(bases, tmp_path):
    reference = theirs("llama", **THEIRS["all-linear"])
    reference.save_pretrained(tmp_path / "adapter")
    model, params = carry_over(tiny_hf("llama"), tmp_path / "base", max_shard_size="20kB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    whole = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    whole.unlink()
    half = {
        name: f"adapter_model-0000{1 + ('mlp' in name)}-of-00002.safetensors" for name in tensors
    }
    for file in set(half.values()):
        safetensors.numpy.save_file(
            {name: tensors[name] for name in tensors if half[name] == file}, whole.with_name(file)
        )
    whole.with_name("adapter_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": half})
    )
    adapters, spec = hub.load_peft(tmp_path / "adapter", model, params)
    np.testing.assert_allclose(
        quick_jit(model.apply)(merged(params, adapters, spec), TOKENS),
        hf_logits(reference, TOKENS),
        atol=1e-4,
    )


def test_names_of_a_base_that_was_part_of_a_larger_one(bases, tmp_path):
    """Names are those in adapters of the multimodal Gemma 3."""
    _, model, params, _ = bases("gemma3_text")
    spec = Spec(rank=3, targets="(q|up)_proj", layers=(2,), trained="final_norm")
    adapters, _ = random_adapter(spec, params)
    hub.save_peft(tmp_path / "a", adapters, spec, model, params)

    def longer(tensors):
        return {
            name.replace("model.model.model.", "model.model.model.language_model."): tensor
            for name, tensor in tensors.items()
        }

    rewrite(
        tmp_path / "a",
        tensors=longer,
        target_modules=r".*language_model\.layers\.2\..*(q|up)_proj",
        layers_to_transform=None,
    )
    back, _ = hub.load_peft(tmp_path / "a", model, params)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


SPEC = Spec(rank=4, targets="(q|up)_proj")
UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(bases, tmp_path):
    """A folder as `save_peft` writes it, for Gemma's base."""
    _, model, params, _ = bases("gemma3_text")
    hub.save_peft(tmp_path / "adapter", random_adapter(SPEC, params)[0], SPEC, model, params)
    return tmp_path / "adapter"


def rewrite(folder: Path, tensors=lambda t: t, **config) -> None:
    file = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(file)), file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def refused(bases, folder, family="gemma3_text") -> str:
    _, model, params, _ = bases(family)
    with pytest.raises(UserError) as caught:
        hub.load_peft(folder, model, params)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("lora_bias", True),
        ("use_qalora", True),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 2}),
        ("arrow_config", {"top_k": 2}),
        ("eva_config", [2.0]),
        ("megatron_config", {"x": 1}),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["experts.w"]),
        ("use_bdlora", {"nblocks": 2}),
        ("a_field_of_tomorrow", 1),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", ["pissa"]),
        ("init_lora_weights", 1),
        ("target_modules", ["qkv_proj"]),
        ("target_modules", None),
        ("target_modules", "(q_proj"),
        ("target_modules", [1]),
        ("layers_to_transform", "1"),
        ("modules_to_save", ["classifier"]),
        ("trainable_token_indices", {"lm_head": [1]}),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("r", None),
        ("r", 2**40),
        ("r", True),
        ("lora_alpha", 0),
        ("lora_alpha", 10**400),
        ("layers_to_transform", [-1]),
        ("lora_dropout", 1.5),
        ("use_dora", "yes"),
    ],
)
def test_a_field_that_is_not_computed_is_refused_by_name(bases, saved, field, value):
    rewrite(saved, **{field: value})
    names = {"target_modules": "target_modules|regular expression"}
    assert re.search(names.get(field, field), refused(bases, saved))


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_off_is_no_matter(bases, saved, value):
    _, model, params, _ = bases("gemma3_text")
    rewrite(
        saved,
        a_field_of_tomorrow=value,
        use_qalora=False,
        megatron_core="megatron.core",
        qalora_group_size=16,
        runtime_config={"x": 1},
    )
    assert hub.load_peft(saved, model, params)[1].rank == 4


def test_ranks_that_no_kernel_can_have_are_refused(bases, saved):
    rewrite(saved, r=0)
    assert "r=0 must be a whole number from 1" in refused(bases, saved)
    rewrite(saved, r=25, init_lora_weights="pissa")
    assert "rank=25 is above min(in, out) of 'layers/attn/q_proj/kernel'" in refused(bases, saved)


def test_another_base_is_told_by_tensor_and_both_shapes(bases, saved):
    def cut(tensors):
        return {**tensors, f"{UP}.lora_B.weight": tensors[f"{UP}.lora_B.weight"][:40]}

    rewrite(saved, cut)
    assert (
        f"'{UP}.lora_B.weight' has shape [40, 4], this base and adapter_config.json ask for [44, 4]"
        in refused(bases, saved)
    )
    rewrite(saved, lambda t: {name: x for name, x in t.items() if name != f"{UP}.lora_B.weight"})
    assert f"'{UP}.lora_B.weight' is missing" in refused(bases, saved)
    rewrite(
        saved,
        lambda t: {
            **t,
            f"{UP}.lora_B.weight": np.zeros((44, 4), np.float32),
            f"{UP}.lora_C": np.zeros(1, np.float32),
        },
    )
    assert f"'{UP}.lora_C' has no place" in refused(bases, saved)
    rewrite(saved, lambda t: {name.replace("base_model.model.", ""): x for name, x in t.items()})
    assert "has no place" in refused(bases, saved)
    rewrite(saved, r=3)
    rewrite(
        saved,
        lambda t: {
            f"base_model.model.{name}": x for name, x in t.items() if not name.endswith("lora_C")
        },
    )
    assert "has shape [4, 24], this base and adapter_config.json ask for [3, 24]" in refused(
        bases, saved
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_none_are_named(bases, saved, value, tmp_path):
    rewrite(saved, lambda t: {**t, f"{UP}.lora_A.weight": np.full((4, 24), value, np.float32)})
    assert f"'{UP}.lora_A.weight' holds NaN or infinity" in refused(bases, saved)
    _, model, params, _ = bases("gemma3_text")
    adapters, _ = random_adapter(SPEC, params)
    bad = {
        **adapters,
        "layers/mlp/up_proj/kernel": {
            **adapters["layers/mlp/up_proj/kernel"],
            "a": jnp.full((4, 24, 4), value),
        },
    }
    with pytest.raises(UserError, match=r"up_proj\.lora_A\.weight' holds NaN or infinity"):
        hub.save_peft(tmp_path / "new", bad, SPEC, model, params)
    assert not (tmp_path / "new").exists()


def test_files_that_are_none(bases, saved, tmp_path):
    file, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    data = file.read_bytes()
    for keep in (0, 100, len(data) - 1):
        file.write_bytes(data[:keep])
        assert "damaged or truncated" in refused(bases, saved)
    file.unlink()
    assert "no adapter_model.safetensors" in refused(bases, saved)
    (saved / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "adapter_model.bin is a pickle" in refused(bases, saved)
    file.write_bytes(data)
    for text, told in (
        ("{", "not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no 'peft_type'"),
    ):
        config.write_text(text)
        assert told in refused(bases, saved)
    config.unlink()
    assert "has no adapter_config.json" in refused(bases, saved)


def test_an_embedding_apart_from_its_tied_head_is_refused(bases, tmp_path):
    for i, config in enumerate(
        (
            dict(target_modules=["embed_tokens"]),
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        )
    ):
        theirs("gemma3_text", r=3, **config).save_pretrained(tmp_path / str(i))
        assert "ensure_weight_tying is false" in refused(bases, tmp_path / str(i))


def test_what_cannot_be_written_is_refused(bases, tmp_path):
    _, model, params, _ = bases("qwen2")

    def told(spec: Spec) -> str:
        with pytest.raises(UserError) as caught:
            hub.save_peft(
                tmp_path / "new", lora.init(spec, params, jax.random.key(0)), spec, model, params
            )
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    assert "lora.plain" in told(Spec(rank=2, init="pissa"))
    # without its bias
    assert "whole modules" in told(Spec(rank=2, targets="k_proj", trained="q_proj/kernel"))
    assert "DoRA beside 'lm_head'" in told(Spec(rank=2, targets="head", dora=True))
    _, moe, of_moe, _ = bases("mixtral")
    for trained in ("router", "down_experts"):
        spec = Spec(rank=2, targets="q_proj", trained=trained)
        with pytest.raises(
            UserError, match=f"'layers/mlp/{trained}' is trained, for which PEFT has no form"
        ):
            hub.save_peft(
                tmp_path / "new", lora.init(spec, of_moe, jax.random.key(0)), spec, moe, of_moe
            )
    (tmp_path / "new").write_text("taken")
    with pytest.raises(UserError, match="exists already"):
        hub.save_peft(tmp_path / "new", *random_adapter(SPEC, params), model, params)


def test_a_base_without_values_will_do_except_for_pissa(bases, saved, tmp_path):
    _, model, params, _ = bases("gemma3_text")
    abstract = model.abstract_params()
    expected = hub.load_peft(saved, model, params)
    jax.tree.map(
        np.testing.assert_array_equal, hub.load_peft(saved, model, abstract)[0], expected[0]
    )
    rewrite(saved, init_lora_weights="pissa")
    with pytest.raises(UserError, match="whose values are needed"):
        hub.load_peft(saved, model, abstract)
