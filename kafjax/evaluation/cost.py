"""The bill: what a method costs to learn, to keep and to ask. Formulas here take plain numbers; the
clock and XLA give the rest.

FLOPs count multiplications and additions (2 per multiply-add) of the matrix products that the
mathematics needs: causal attention counts only what a token may see, and recomputation (remat) is
not counted. Norms, activations and the optimizer are left out (well under 1%). `N` below is the
number of block matmul weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

TOTAL = "total"
STAGES = ("embed", "search", "rerank", "prefill", "decode")
OTHER = "other"


@dataclasses.dataclass(frozen=True)
class TokensPerQuery:
    """Mean LLM tokens of one query over all its calls. `cached` of the `prompt` tokens came from a
    prefix computed once."""

    prompt: float = 0.0
    cached: float = 0.0
    output: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """One method's bill for one corpus. None means not measured; zero means it costs nothing.

    `train_tokens` counts every pass over the data. `train_flops_formula` is this module's,
    `train_flops_measured` XLA's `cost_analysis` of the compiled step times the steps run, and
    `train_flops_useful` the same without places of the loss that have no target. `train_seconds`
    are without compiling, which `compile_seconds` took. `train_memory_bytes` is what the compiled
    training step needs (`memory_analysis`): it depends on nothing that ran before, as
    `peak_memory_bytes` of the process does.
    `artifact_bytes` is what must be kept for this corpus beside the base model: weights or adapter,
    or the index with its text. `peak_memory_bytes` is the highest of learning and answering.
    `adapter_only` says that the base model's weights stay as they are. `latency_seconds` is
    `latency_summary`'s.
    """

    trainable_parameters: int = 0
    adapter_only: bool = False
    optimizer_bytes: int = 0
    train_tokens: int = 0
    train_flops_formula: float = 0.0
    train_flops_measured: float | None = None
    train_flops_useful: float | None = None
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    train_memory_bytes: int | None = None
    index_seconds: float = 0.0
    index_flops_formula: float = 0.0
    peak_memory_bytes: int | None = None
    artifact_bytes: int = 0
    llm_calls_per_query: float = 0.0
    llm_tokens_per_query: TokensPerQuery = TokensPerQuery()
    query_flops_formula: float = 0.0
    latency_seconds: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """A decoder in the numbers that its FLOPs depend on.

    `block_params`: matmul weights of all blocks together (attention and MLP projections; no
    embedding, no norms). Of `layers`, `sliding_layers` see only the last `window` tokens. The
    others' heads are of size `full_head_dim`, or of `head_dim`, too, where that is 0.
    """

    block_params: int
    layers: int
    heads: int
    head_dim: int
    d_model: int
    vocab: int
    sliding_layers: int = 0
    window: int = 0
    full_head_dim: int = 0

    @property
    def head_dims(self) -> int:
        """Sizes of a head in all layers together."""
        return self.sliding_layers * self.head_dim + (self.layers - self.sliding_layers) * (
            self.full_head_dim or self.head_dim
        )


def attention_flops(shape: DecoderShape, length: int, start: int = 0) -> int:
    """FLOPs of the scores and the weighted values, forward, for positions `start .. length - 1` of
    one sequence.

    A token at position t sees t + 1 tokens (at most the window), at 4 * heads * head_dim FLOPs
    each.
    """
    full = _seen(length, length) - _seen(start, length)
    sliding = _seen(length, shape.window) - _seen(start, shape.window)
    of_full = (shape.layers - shape.sliding_layers) * (shape.full_head_dim or shape.head_dim) * full
    return 4 * shape.heads * (of_full + shape.sliding_layers * shape.head_dim * sliding)


def _seen(length: int, window: int) -> int:
    """sum of min(t + 1, window) over t < length."""
    ramp = min(length, window)
    return ramp * (ramp + 1) // 2 + max(length - window, 0) * window


def train_flops_full(
    shape: DecoderShape, tokens: int, loss_tokens: int, length: int, *, embedding_trained: bool
) -> float:
    """FLOPs of full fine-tuning on `tokens` tokens in sequences of `length`, with logits at
    `loss_tokens` of them.

    6N a token (forward 2N, gradient of the activations 2N, of the weights 2N; Kaplan et al. 2020)
    and three times the forward attention. The tied head costs 6 * d_model * vocab a loss token, 4
    if the embedding is frozen (no weight gradient).
    """
    head = (6 if embedding_trained else 4) * shape.d_model * shape.vocab * loss_tokens
    return (
        6 * shape.block_params * tokens
        + 3 * attention_flops(shape, length) * tokens / length
        + head
    )


def train_flops_lora(
    shape: DecoderShape, tokens: int, loss_tokens: int, length: int, *, adapter_params: int
) -> float:
    """FLOPs of LoRA training: 4N a token (no gradient of the frozen weights), 6 an adapter
    parameter, head and attention as in full.

    An upper bound where the lowest layers have no adapter: no gradient has to reach them.
    """
    head = 4 * shape.d_model * shape.vocab * loss_tokens
    return (
        (4 * shape.block_params + 6 * adapter_params) * tokens
        + 3 * attention_flops(shape, length) * tokens / length
        + head
    )


def query_flops(
    shape: DecoderShape,
    prompt_tokens: float,
    output_tokens: float,
    cached_tokens: float = 0,
    calls: float = 1,
    adapter_params: int = 0,
) -> float:
    """Forward FLOPs of one query; token counts are sums over its `calls`, as in `Prediction`, and
    may be means.

    Prompt tokens that are not cached and every output token but the last of each call go through
    the blocks at 2N (and 2 an unmerged adapter parameter); each output token needs one row of
    logits. Attention takes the calls as equally long.
    """
    if calls == 0:
        return 0.0
    processed = prompt_tokens - cached_tokens + max(output_tokens - calls, 0)
    start = round(cached_tokens / calls)
    end = round((prompt_tokens + max(output_tokens - calls, 0)) / calls)
    blocks = 2 * (shape.block_params + adapter_params) * processed
    return (
        blocks
        + attention_flops(shape, end, start) * calls
        + 2 * shape.d_model * shape.vocab * output_tokens
    )


def encoder_flops(
    block_params: int, layers: int, d_model: int, tokens: float, length: float
) -> float:
    """Forward FLOPs of a bidirectional encoder on `tokens` tokens in texts of `length`: 2N + 4 *
    layers * d_model * length a token."""
    return tokens * (2 * block_params + 4 * layers * d_model * length)


def lora_parameters(kernels: Iterable[tuple[int, int]], rank: int) -> int:
    """Adapter parameters for `[in, out]` kernels: rank * (in + out) each (Hu et al. 2021)."""
    return sum(rank * (n_in + n_out) for n_in, n_out in kernels)


def adam_bytes(trainable_parameters: int) -> int:
    """Optimizer state of Adam(W): two float32 moments a trainable parameter."""
    return 2 * 4 * trainable_parameters


def latency_summary(stage_seconds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{stage: {p50, p95, mean, sd, n}}` in seconds over queries, from one `{stage: seconds}` a query;
    empty for no queries.

    A stage that a query lacks took it 0 s. A measured `total` is kept, and what it holds beyond the
    stages becomes `other`; without one, the total is the sum. Only means add up: the p50s of the
    stages do not sum to the p50 of the total.
    """
    if not stage_seconds:
        return {}
    names = [stage for stage in STAGES if any(stage in row for row in stage_seconds)]
    names += sorted({stage for row in stage_seconds for stage in row} - {*STAGES, TOTAL})
    columns = {stage: np.array([row.get(stage, 0.0) for row in stage_seconds]) for stage in names}
    staged_N = sum(columns.values(), np.zeros(len(stage_seconds)))
    total_N = np.array(
        [row.get(TOTAL, staged) for row, staged in zip(stage_seconds, staged_N, strict=True)]
    )
    rest_N = np.maximum(total_N - staged_N, 0.0)
    if rest_N.any():
        columns[OTHER] = columns.get(OTHER, 0.0) + rest_N
    return {
        stage: _percentiles(seconds_N) for stage, seconds_N in {TOTAL: total_N, **columns}.items()
    }


def _percentiles(seconds_N: np.ndarray) -> dict[str, float]:
    p50, p95 = np.percentile(seconds_N, [50, 95])
    return {
        "p50": float(p50),
        "p95": float(p95),
        "mean": float(seconds_N.mean()),
        "sd": float(seconds_N.std(ddof=1)) if seconds_N.size > 1 else 0.0,
        "n": seconds_N.size,
    }


def break_even(extra_once: float, saved_per_query: float) -> float | None:
    """Queries after which `extra_once`, paid up front, is repaid by `saved_per_query`. None if a
    query saves nothing."""
    if saved_per_query <= 0:
        return None
    return max(extra_once, 0.0) / saved_per_query


def break_even_interval(
    extra_once: float, dear: Mapping[str, float], cheap: Mapping[str, float]
) -> tuple[float | None, float | None] | None:
    """95% interval of `break_even`'s queries, where a query of one method takes `dear` and of the
    other `cheap` (`latency_summary`'s totals).

    It is Student's interval of the difference of two means, with the degrees of freedom of the
    smaller sample. None as a bound is never; None alone: fewer than two queries were timed, or an
    older release noted no standard deviation.
    """
    n = min(dear["n"], cheap["n"])
    if n < 2 or "sd" not in dear or "sd" not in cheap:
        return None
    saved = dear["mean"] - cheap["mean"]
    error = math.sqrt(dear["sd"] ** 2 / dear["n"] + cheap["sd"] ** 2 / cheap["n"])
    reach = float(special.stdtrit(n - 1, 0.975)) * error
    return break_even(extra_once, saved + reach), break_even(extra_once, saved - reach)


def break_even_rule(
    train_tokens: float, retrieved_tokens: float, *, adapter_only: bool
) -> float | None:
    """Rule of thumb Q* = 3 D / (k L) for full fine-tuning, 2 D / (k L) for LoRA.

    Training costs 6N (LoRA 4N) a token on `train_tokens` D, reading costs 2N a token on the
    `retrieved_tokens` k L that retrieval adds to each prompt; N cancels. Attention, logits,
    adapters, embedding and search are left out.
    """
    return break_even((2 if adapter_only else 3) * train_tokens, retrieved_tokens)
