"""The rows of `benchmarks.bench`: work, both sides, the least ratio, and what shows that both
compute the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.processes import COLD, PROCESS, WARM, Job, once
from kafjax.core.errors import UserError

Check = Callable[[np.ndarray, np.ndarray], None]
"""Takes the results of ours and of the peer. Raises `Different`."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
PROMPT_TOKENS, SHORT_PROMPT, NEW_TOKENS, TEXTS = 256, 16, 64, 256
FLOOR_SHARE = 0.6  # decoding: of the memory's bandwidth


class Different(UserError):
    """Both sides do not compute the same."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      target: the peer's time over ours, at least.
      share: of the machine's ceiling, at least; None without such a target.
      timed: what a turn is (`benchmarks.processes`).
      most_turns: where a turn takes minutes.
      quick: whether it is in `--quick`, too.
    """

    name: str
    against: str
    ours: Job
    peer: Job
    target: float
    check: Check
    dtype: str = "float32"
    share: float | None = None
    timed: str = WARM
    most_turns: int = 100
    quick: bool = False


def rows(
    model: str, best_dtype: str, scratch: Path, *, compiled: bool, profile: str = "default"
) -> list[Row]:
    """Makes all rows.

    Args:
      model: folder of the decoder that both sides read.
      best_dtype: of the embedding's products.
      scratch: folder for what one side hands to the other.
      compiled: whether peers try `torch.compile`, too.
      profile: size of the comparison.
    """
    made = [
        *(
            train_row(model, scratch, dtype, 4, 128, n_last=n_last, compiled=compiled)
            for dtype in TOLERANCE
            for n_last in (None, 16)
        ),
        *(
            train_row(model, scratch, dtype, *size, rank=rank, compiled=compiled)
            for dtype in TOLERANCE
            for rank in (8, 64)
            for size in ((8, 128), (4, 256))
        ),
        lanes_row(model),
        *(
            answer_row(model, scratch, kind, dtype, batch, compiled)
            for kind, batches in (("prefill", (1, 8)), ("decode", (1, 8, 32)))
            for batch in batches
            for dtype in TOLERANCE
        ),
        *(embedding_row(words, best_dtype) for words in (24, 100)),
        first_token_row(model),
        compare_row(profile),
    ]
    return [dataclasses.replace(row, quick=row.name in QUICK) for row in made]


QUICK = (
    "full, float32, loss on the last 16",
    "LoRA r8, 8x128, bfloat16",
    "prefill 256, batch 1, float32",
    "decode, batch 1, bfloat16",
    "decode, batch 8, float32",
    "embedding, 24 words",
    "import to first token",
)


def train_row(
    model: str,
    scratch: Path,
    dtype: str,
    rows: int,
    seq_len: int,
    *,
    n_last: int | None = None,
    rank: int | None = None,
    compiled: bool,
) -> Row:
    looks_at = "all tokens" if n_last is None else f"the last {n_last}"
    name = (
        f"LoRA r{rank}, {rows}x{seq_len}, {dtype}" if rank else f"full, {dtype}, loss on {looks_at}"
    )
    adapter = str(scratch / name.replace(" ", "_") / "adapter")
    sizes = {"rows": rows, "seq_len": seq_len, "n_last": n_last, "rank": rank, "dtype": dtype}
    work = {"folder": model, "adapter": adapter if rank else None, **sizes}
    return Row(
        name,
        "peft" if rank else "torch",
        Job("benchmarks.ours:train", work),
        Job("benchmarks.theirs:train", {**work, "compiled": compiled}),
        1.6 if rank and dtype == "bfloat16" else 1.3,
        functools.partial(same_step, TOLERANCE[dtype]),
        dtype,
    )


def lanes_row(model: str) -> Row:
    work = {"folder": model, "n": 8, "rows": 2, "seq_len": 64, "rank": 8, "steps": 24}
    return Row(
        "8 lanes, compile included",
        "8 runs of peft",
        Job("benchmarks.ours:lanes", work),
        Job("benchmarks.theirs:peft_runs", work),
        3.0,
        same_runs,
        timed=COLD,
        most_turns=3,
    )


def answer_row(model: str, scratch: Path, kind: str, dtype: str, batch: int, compiled: bool) -> Row:
    length = PROMPT_TOKENS if kind == "prefill" else SHORT_PROMPT
    asked = {"folder": model, "batch": batch, "length": length}
    work = {**asked, "kind": kind, "dtype": dtype, "n_new": NEW_TOKENS}
    decodes = kind == "decode"
    if not decodes:
        check: Check = functools.partial(same_logits, TOLERANCE[dtype])
    elif dtype == "float32":
        check = same_tokens
    else:
        referee = functools.partial(Job, "benchmarks.theirs:regret")
        check = functools.partial(
            no_regret, lambda tokens: once(referee({**asked, "tokens": tokens}), scratch / "regret")
        )
    return Row(
        f"{kind}{'' if decodes else f' {length}'}, batch {batch}, {dtype}",
        "transformers",
        Job("benchmarks.ours:answering", work),
        Job("benchmarks.theirs:answering", {**work, "compiled": compiled}),
        1.6 if decodes else 1.3,
        check,
        dtype,
        share=FLOOR_SHARE if decodes else None,
    )


def embedding_row(words: int, dtype: str) -> Row:
    work = {"words": words, "texts": TEXTS, "dtype": dtype}
    return Row(
        f"embedding, {words} words",
        f"sentence-transformers, {dtype}",
        Job("benchmarks.ours:embedding", work),
        Job("benchmarks.theirs:embedding", work),
        1.3,
        functools.partial(same_vectors, dtype),
        dtype,
    )


def first_token_row(model: str) -> Row:
    work = {"folder": model, "dtype": "float32"}
    return Row(
        "import to first token",
        "transformers",
        Job("benchmarks.ours:first_token_of", work),
        Job("benchmarks.theirs:first_token_of", work),
        2.0,
        same_tokens,
        timed=PROCESS,
    )


COMPARE = "the whole compare"


def compare_row(profile: str) -> Row:
    return Row(
        COMPARE,
        "by hand",
        Job("benchmarks.by_hand:compare", {"profile": profile}),
        Job("benchmarks.by_hand:peers", {"profile": profile}),
        2.0,
        same_comparison,
        timed=COLD,
        most_turns=1,
    )


def same_step(tolerance: float, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Losses within `tolerance`, and gradient norms by that share of them."""
    (loss, norm), (their_loss, their_norm) = ours, theirs
    if not (abs(loss - their_loss) <= tolerance and abs(norm / their_norm - 1) <= tolerance):
        raise Different(
            f"losses {loss:.6f} and {their_loss:.6f}, gradient norms {norm:.5f} and {their_norm:.5f}"
        )


def same_runs(ours_2xN: np.ndarray, theirs_2xN: np.ndarray) -> None:
    """First losses equal, for adapters begin as no change at all; last ones, of adapters drawn
    apart, alike: what either side learned differs by less than a quarter of it."""
    first, last = np.abs(ours_2xN - theirs_2xN)
    learned = (theirs_2xN[0] - theirs_2xN[1]).mean()
    if not (first.max() <= 1e-3 and learned > 0 and last.mean() <= learned / 4):
        raise Different(
            f"first losses differ by {first.max():.2g}, last by {last.mean():.2g} of {learned:.2g} learned"
        )


def same_logits(tolerance: float, ours_BxV: np.ndarray, theirs_BxV: np.ndarray) -> None:
    """Differences within `tolerance` of the largest magnitude."""
    difference = float(np.abs(ours_BxV - theirs_BxV).max() / np.abs(theirs_BxV).max())
    if not difference <= tolerance:
        raise Different(f"logits differ by {difference:.2g} of the largest")


def same_tokens(ours: np.ndarray, theirs: np.ndarray) -> None:
    if not np.array_equal(ours, theirs):
        raise Different(f"replies differ: {ours.ravel()[:8]} and {theirs.ravel()[:8]}")


def no_regret(
    referee: Callable[[list[list[int]]], np.ndarray], ours: np.ndarray, theirs: np.ndarray
) -> None:
    """Each side's token has at every place nearly the highest logit of the float32 model: in
    bfloat16 near candidates change places, and all that follows with them."""
    for name, tokens_BxN in (("ours", ours), ("the peer's", theirs)):
        regret = float(referee(tokens_BxN.tolist()).max())
        if not regret <= TOLERANCE["bfloat16"]:
            raise Different(
                f"{name} tokens are not greedy: {regret:.2g} of the largest logit behind"
            )


def same_vectors(dtype: str, ours_NxD: np.ndarray, theirs_NxD: np.ndarray) -> None:
    difference = float(np.abs(ours_NxD - theirs_NxD).max())
    cosine = float((ours_NxD * theirs_NxD).sum(axis=1).min())
    if not (difference <= 1e-5 if dtype == "float32" else cosine >= 0.99):
        raise Different(f"vectors differ by {difference:.2g}, lowest cosine {cosine:.4f}")


def same_comparison(ours_9x3: np.ndarray, theirs_9x3: np.ndarray) -> None:
    """Rows of `by_hand.compare`: the same steps and questions, the same loss of held-out text before
    training; after it alike, since adapters are drawn apart; with the right passage like answers."""
    same_counts = np.array_equal(ours_9x3[:8, 0], theirs_9x3[:8, 0]) and np.array_equal(
        ours_9x3[8], theirs_9x3[8]
    )
    nats = np.abs(theirs_9x3[:8, 2] / ours_9x3[:8, 2] - 1)
    oracle = abs(ours_9x3[1, 1] - theirs_9x3[1, 1])
    if not (same_counts and nats[:4].max() <= 1e-3 and nats.max() <= 0.3 and oracle <= 0.1):
        raise Different(
            f"questions {ours_9x3[:8, 0]} and {theirs_9x3[:8, 0]}, steps {ours_9x3[8]} and {theirs_9x3[8]}, "
            f"losses {ours_9x3[:8, 2]} and {theirs_9x3[:8, 2]}, oracle {ours_9x3[1, 1]:.2f} and {theirs_9x3[1, 1]:.2f}"
        )
