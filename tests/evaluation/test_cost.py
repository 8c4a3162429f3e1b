"""The FLOP formulas against torch's own count of what a real Gemma 3 and a real PEFT model
execute."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from kafjax.evaluation import cost

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 512,
}
BLOCK_PARAMS = 3 * (64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 192)
SHAPE = cost.DecoderShape(
    block_params=BLOCK_PARAMS, layers=3, heads=4, head_dim=32, d_model=64, vocab=160
)
ATTENTION_OF_A_PAIR = 4 * 3 * 4 * 32  # FLOPs of one token seeing one token, all layers and heads


@pytest.fixture(scope="module")
def gemma():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**SIZES, attn_implementation="eager")
    return transformers.Gemma3ForCausalLM(config)


def counted(model, tokens, backward: bool = True) -> int:
    """FLOPs of the matrix products that torch runs; its masked attention computes all T x T
    pairs."""
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def unseen_pairs(batch: int, length: int) -> int:
    """FLOPs of the pairs that a causal mask throws away, which the formulas leave out."""
    return ATTENTION_OF_A_PAIR * batch * (length * length - length * (length + 1) // 2)


@pytest.mark.parametrize(("batch", "length"), [(6, 1), (2, 40)])
def test_full_training_formula_equals_torchs_count(gemma, batch, length):
    tokens = torch.randint(0, 160, (batch, length))
    formula = cost.train_flops_full(
        SHAPE, batch * length, batch * length, length, embedding_trained=True
    )
    assert formula + 3 * unseen_pairs(batch, length) == pytest.approx(
        counted(gemma, tokens), rel=0.005
    )


def test_a_frozen_embedding_saves_its_weight_gradient(gemma):
    gemma.model.embed_tokens.weight.requires_grad_(False)
    gemma.enable_input_require_grads()
    try:
        flops = counted(gemma, torch.randint(0, 160, (2, 40)))
    finally:
        gemma.disable_input_require_grads()
        gemma.model.embed_tokens.weight.requires_grad_(True)
    formula = cost.train_flops_full(SHAPE, 80, 80, 40, embedding_trained=False)
    assert formula + 3 * unseen_pairs(2, 40) == pytest.approx(flops, rel=0.005)


def test_lora_training_formula_equals_torchs_count_of_peft():
    model = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, attn_implementation="eager")
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.enable_input_require_grads()
    kernels = 3 * [(64, 128), (64, 64), (64, 64), (128, 64), (64, 192), (64, 192), (192, 64)]
    adapter_params = cost.lora_parameters(kernels, rank=4)
    assert adapter_params == model.get_nb_trainable_parameters()[0]
    formula = cost.train_flops_lora(SHAPE, 80, 80, 40, adapter_params=adapter_params)
    assert formula + 3 * unseen_pairs(2, 40) == pytest.approx(
        counted(model, torch.randint(0, 160, (2, 40))), rel=0.01
    )


def test_query_formula_equals_torchs_count_of_prefill_and_cached_decoding(gemma):
    tokens = torch.randint(0, 160, (1, 30))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = gemma(input_ids=tokens, use_cache=True, logits_to_keep=1)
        for _ in range(4):
            output = gemma(
                input_ids=tokens[:, :1], past_key_values=output.past_key_values, use_cache=True
            )
    formula = cost.query_flops(SHAPE, prompt_tokens=30, output_tokens=5)
    assert formula + unseen_pairs(1, 30) == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_lora_formula_gives_the_published_sizes_of_gemma_270m():
    attention = [(640, 1024), (640, 256), (640, 256), (1024, 640)]
    mlp = [(640, 2048), (640, 2048), (2048, 640)]
    assert cost.lora_parameters(18 * (attention + mlp), rank=1) == 237_312
    assert cost.lora_parameters(18 * attention, rank=1) == 92_160
    assert cost.lora_parameters(18 * mlp, rank=1) == 145_152


@pytest.mark.parametrize("window", [1, 7, 40, 100])
def test_sliding_attention_counts_the_mask(window):
    shape = cost.DecoderShape(
        block_params=0,
        layers=5,
        sliding_layers=4,
        window=window,
        heads=2,
        head_dim=8,
        d_model=16,
        vocab=10,
    )
    i, j = np.indices((40, 40))
    causal, local = (j <= i)[15:], ((j <= i) & (i - j < window))[15:]
    assert cost.attention_flops(shape, 40, start=15) == 4 * 2 * 8 * (
        1 * causal.sum() + 4 * local.sum()
    )


def test_a_cached_prefix_saves_exactly_its_own_pass():
    whole = cost.query_flops(SHAPE, prompt_tokens=200, output_tokens=8)
    cached = cost.query_flops(SHAPE, prompt_tokens=200, output_tokens=8, cached_tokens=150)
    assert whole - cached == cost.query_flops(SHAPE, prompt_tokens=150, output_tokens=0)


def test_two_equal_calls_cost_twice_one():
    one = cost.query_flops(SHAPE, prompt_tokens=100, output_tokens=10, cached_tokens=20)
    assert (
        cost.query_flops(SHAPE, prompt_tokens=200, output_tokens=20, cached_tokens=40, calls=2)
        == 2 * one
    )
    assert cost.query_flops(SHAPE, 0, 0, calls=0) == 0


def test_latency_stages_add_up_in_the_mean_and_the_rest_is_named():
    rng = np.random.default_rng(0)
    rows = [
        {"prefill": a, "decode": b, "total": a + b + 0.01} for a, b in rng.exponential(0.2, (50, 2))
    ]
    rows[3]["search"] = 0.005
    summary = cost.latency_summary(rows)
    assert list(summary) == ["total", "search", "prefill", "decode", "other"]
    assert sum(
        stage["mean"] for name, stage in summary.items() if name != "total"
    ) == pytest.approx(summary["total"]["mean"])
    assert summary["search"]["p50"] == 0
    assert summary["search"]["mean"] == pytest.approx(0.005 / 50)
    assert all(stage["p50"] <= stage["p95"] and stage["n"] == 50 for stage in summary.values())


def test_latency_without_a_total_is_the_sum_of_its_stages():
    summary = cost.latency_summary(
        [{"prefill": 0.2, "decode": 0.3}, {"prefill": 0.2, "decode": 0.5}]
    )
    assert summary["total"]["mean"] == pytest.approx(0.6)
    assert "other" not in summary
    assert cost.latency_summary([]) == {}


def test_break_even_is_where_the_running_costs_cross():
    queries = cost.break_even(extra_once=300.0, saved_per_query=0.25)
    assert queries == 1200
    assert cost.break_even(300.0, 0.0) is None
    assert cost.break_even(300.0, -1.0) is None
    assert cost.break_even(-5.0, 1.0) == 0


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_rule_of_thumb_is_the_formulas_without_attention_and_logits(adapter_only):
    shape = cost.DecoderShape(block_params=10**8, layers=0, heads=0, head_dim=0, d_model=0, vocab=0)
    if adapter_only:
        training = cost.train_flops_lora(shape, 160_000, 0, 100, adapter_params=0)
    else:
        training = cost.train_flops_full(shape, 160_000, 0, 100, embedding_trained=False)
    saved = cost.query_flops(shape, 330, 6) - cost.query_flops(shape, 70, 6)
    rule = cost.break_even_rule(160_000, 260, adapter_only=adapter_only)
    assert rule == pytest.approx(cost.break_even(training, saved))


def test_break_even_has_the_interval_of_the_saving():
    """Coverage of a known crossing: 100 s to repay, 0.5 s saved a query on average."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        dear, cheap = (
            cost.latency_summary([{"decode": x} for x in rng.normal(mean, 0.2, 12)])["total"]
            for mean in (1.0, 0.5)
        )
        low, high = cost.break_even_interval(100.0, dear, cheap)
        covered += low <= 200.0 and (high is None or 200.0 <= high)
    assert 0.93 <= covered / 300 <= 0.99


def test_where_a_query_may_save_nothing_the_break_even_may_be_never():
    slow = {"mean": 1.0, "sd": 0.5, "n": 5}
    low, high = cost.break_even_interval(10.0, slow, {**slow, "mean": 0.9})
    assert low is not None and low > 0 and high is None
    assert cost.break_even_interval(10.0, {**slow, "n": 1}, slow) is None
    assert cost.break_even_interval(10.0, {"mean": 1.0, "n": 5}, slow) is None
