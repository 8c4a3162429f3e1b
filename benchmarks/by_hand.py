"""The whole default comparison beside the same work by transformers, peft, sentence-transformers and
faiss: a row of `benchmarks.bench --compare`.

    python -m benchmarks.bench --rows='whole compare'                    an hour
    python -m benchmarks.bench --rows='whole compare' --profile=smoke    minutes, to see that it runs

By hand means: train the adapter and all weights on the same packed batches, in the same order and at
the same rates; embed the passages, index them with faiss; ask each of the eight methods the same
questions, greedily, with the same limits, in batches of the same size, until each reply's line ends;
the single queries of the latency; the loss of the held-out texts under the base and both trained
models; and the misses of the hybrids again from the passage that answers them.

What is easier by hand: no report, no checkpoints, no intervals. What our side has and this one does
not: worked examples are read once for all questions. Loading the models is in both times, imports
are in neither.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side import Side
from benchmarks.work import TARGETS

METHODS = ("base", "oracle", "rag", "hyde", "lora", "full", "lora+rag", "full+rag")
PREFIX = {"base": "closed", "oracle": "oracle", "rag": "reading", "hyde": "reading"}
PAD = 0  # masked, so that any token will do
ROOT = Path(__file__).parents[1]


def compare(profile: str) -> Side:
    """Our side: `experiments.compare`. Gives a row for each method: questions asked, share answered
    right (retention left out), nats a token of the held-out texts; then a row of the trainings'
    steps."""
    from experiments import compare as experiment
    from experiments.configs.compare import PROFILES, Compare
    from kafjax.core.config import changed
    from kafjax.core.rundir import read_jsonl, read_object

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            fields = {"profile": profile, "runs": folder, "name": "ours", **PROFILES[profile]}
            experiment.run(changed(Compare(), **fields))
            of_run, rows = Path(folder) / "ours", []
            for name in METHODS:
                made = read_jsonl(of_run / "arms" / name / "predictions.jsonl")
                right = [row["correct"] for row in made if row["split"] != "retention"]
                arm = read_object(of_run / "arms" / name / "arm.json")
                nats = sum(arm["held_out_nll"]) / sum(arm["held_out_tokens"])
                rows.append([len(made), np.mean(right), nats])
            steps = [
                read_object(of_run / "artifacts" / name / "learned.json")["steps"]
                for name in ("lora", "full")
            ]
            return np.array([*rows, [*steps, 0]])

    return Side(run, {"units": 1})


def peers(profile: str) -> Side:
    """The same by hand. The work is written down before, in a process of its own."""
    # imported before the clock starts, as ours are; and what is missing is told at once
    import faiss  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401

    from benchmarks.theirs import EAGER

    with tempfile.TemporaryDirectory() as folder:
        writing = [sys.executable, "-m", "benchmarks.by_hand_work", folder, profile]
        subprocess.run(writing, cwd=ROOT, check=True, stdout=sys.stderr)
        work = json.loads((Path(folder) / "work.json").read_text())
        with np.load(Path(folder) / "batches.npz") as stored:
            batches = {name: stored[name] for name in stored}
    return Side(lambda: by_hand(work, batches), {"note": EAGER})


def by_hand(work: Mapping[str, Any], batches: Mapping[str, np.ndarray]) -> np.ndarray:
    """Does all of it; gives what `compare` gives."""
    from benchmarks.theirs import encoder, load, use_all_cores

    use_all_cores()
    base = load(work["model"], "float32").eval()
    asker = Asker.open(work, encoder("float32", len(os.sched_getaffinity(0))))
    nats, rows = held_out(base, asker.tokenizer, work), {}
    for reader in ("base", "oracle", "rag", "hyde"):
        rows[reader] = [*asker.asked(base, reader), nats]
    for weights in ("lora", "full"):
        start = copy.deepcopy(base) if weights == "lora" else base  # not needed afterwards
        peer = train(start, batches, work, weights)
        nats = held_out(peer, asker.tokenizer, work)
        rows[weights] = [*asker.asked(peer, "base"), nats]
        rows[f"{weights}+rag"] = [*asker.asked(peer, "rag", again=True), nats]
    n_steps = len(batches["tokens"])
    return np.array([*(rows[name] for name in METHODS), [n_steps, n_steps, 0]])


def train(peer: Any, batches: Mapping[str, np.ndarray], work: Mapping[str, Any], how: str) -> Any:
    """Trains an adapter, which is merged, or all weights. Rows hold several texts: positions that
    begin again keep them apart in transformers' own mask."""
    import peft
    import torch

    if how == "lora":
        config = peft.LoraConfig(
            r=work["rank"], lora_alpha=work["alpha"], target_modules=list(TARGETS), lora_dropout=0.0
        )
        adapted = peft.get_peft_model(peer, config)
    elif work["freeze_embedding"]:
        peer.get_input_embeddings().weight.requires_grad_(False)
    trainable = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0, fused=True)
    peer.train()
    for step, rate in enumerate(work["rates"][how]):
        tokens, positions, places, targets, weights = (
            torch.from_numpy(batches[name][step])
            for name in ("tokens", "positions", "places", "targets", "weights")
        )
        used = weights > 0
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        hidden_BxTxD = peer.model(
            input_ids=tokens.long(), position_ids=positions.long(), use_cache=False
        ).last_hidden_state
        logits_NxV = peer.lm_head(hidden_BxTxD.flatten(0, 1)[places[used].long()])
        nats_N = torch.nn.functional.cross_entropy(
            logits_NxV, targets[used].long(), reduction="none"
        )
        ((nats_N * weights[used]).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trainable, work["clip_norm"])
        optimizer.step()
    return (adapted.merge_and_unload() if how == "lora" else peer).eval()


def held_out(peer: Any, tokenizer: Any, work: Mapping[str, Any]) -> float:
    """Nats a token of the held-out texts, one after another."""
    import torch

    total, count = 0.0, 0
    for text in work["held_out"]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], work["end"]]])
        with torch.inference_mode():
            logits_TxV = peer(input_ids=ids[:, :-1], use_cache=False).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits_TxV, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


@dataclasses.dataclass(frozen=True)
class Asker:
    """Asks a model the questions of `work`, with passages from `index` or without."""

    work: Mapping[str, Any]
    tokenizer: Any
    encode: Callable[[Sequence[str]], np.ndarray]
    index: Any

    @classmethod
    def open(cls, work: Mapping[str, Any], encode: Callable[[Sequence[str]], np.ndarray]) -> Asker:
        """Embeds and indexes the passages."""
        import faiss
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"], padding_side="left")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
        vectors_NxD = encode(work["passages"])
        index = faiss.IndexFlatIP(vectors_NxD.shape[1])
        index.add(vectors_NxD)
        return cls(work, tokenizer, encode, index)

    def asked(self, peer: Any, reader: str, *, again: bool = False) -> tuple[int, float]:
        """Asks all questions, then some alone, for the latency; with `again` those missed with a
        right passage in the prompt once more, with that alone. Returns how many were asked, and the
        share answered right, retention left out."""
        questions = [q for q in self.work["questions"] if q["gold"] or reader != "oracle"]
        passages = self.passages(peer, questions, reader)
        replies = self.replies(peer, questions, passages, reader)
        right = [_is_right(q, reply) for q, reply in zip(questions, replies, strict=True)]
        by_length = sorted(
            (q for q in questions if not q["retention"]), key=lambda q: len(q["text"])
        )
        n = self.work["latency_queries"]
        for question in by_length[:: max(1, len(by_length) // n)][:n]:
            self.replies(peer, [question], self.passages(peer, [question], reader), reader)
        missed = [
            q
            for q, ok, found in zip(questions, right, passages, strict=True)
            if again and not ok and set(found) & set(q["gold"])
        ]
        if missed:
            self.replies(peer, missed, self.passages(peer, missed, "oracle"), "oracle")
        counted = [ok for q, ok in zip(questions, right, strict=True) if not q["retention"]]
        return len(questions), float(np.mean(counted))

    def passages(
        self, peer: Any, questions: Sequence[Mapping[str, Any]], reader: str
    ) -> list[list[str]]:
        """Passages of each question's prompt, best first."""
        if reader == "base":
            return [[] for _ in questions]
        if reader == "oracle":
            return [q["gold"][:1] for q in questions]
        vectors_QxD = self.encode([q["text"] for q in questions])
        if reader == "hyde":
            prefix = self.work["prefixes"]["hyde"]
            prompts = [f"{prefix}Question: {q['text']}\nPassage:" for q in questions]
            made = self.generate(peer, prompts, self.work["hyde_tokens"])
            vectors_QxD = vectors_QxD + self.encode(made)
            vectors_QxD /= np.linalg.norm(vectors_QxD, axis=1, keepdims=True)
        texts = self.work["passages"]
        rows_QxK = self.index.search(vectors_QxD, min(self.work["k"], len(texts)))[1]
        return [[texts[i] for i in rows_K] for rows_K in rows_QxK]

    def replies(
        self,
        peer: Any,
        questions: Sequence[Mapping[str, Any]],
        passages: Sequence[Sequence[str]],
        reader: str,
    ) -> list[str]:
        """Answers each question behind the worked examples and its passages, the best last."""
        prefix = self.work["prefixes"][PREFIX[reader]]
        prompts = [
            prefix
            + "".join(f"Passage: {' '.join(text.split())}\n" for text in reversed(found))
            + f"Question: {q['text']}\nAnswer:"
            for q, found in zip(questions, passages, strict=True)
        ]
        return self.generate(peer, prompts, self.work["limit"])

    def generate(self, peer: Any, prompts: Sequence[str], limit: int) -> list[str]:
        """Greedy lines behind prompts, in batches of prompts of like length."""
        import torch
        import transformers

        replies, batch = [""] * len(prompts), self.work["batch"]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        line_ends = transformers.StoppingCriteriaList([self._line_has_ended])
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            given = self.tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out = peer.generate(
                    **given,
                    max_new_tokens=limit,
                    do_sample=False,
                    stopping_criteria=line_ends,
                    pad_token_id=PAD,
                )
            for i, ids in zip(chosen, out[:, given["input_ids"].shape[1] :], strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                replies[i] = text.split("\n")[0].strip()
        return replies

    def _line_has_ended(self, ids_BxT: Any, _: Any) -> Any:
        import torch

        return torch.tensor(["\n" in self.tokenizer.decode(id) for id in ids_BxT[:, -1]])


def _is_right(question: Mapping[str, Any], reply: str) -> bool:
    return any(answer.lower() in reply.lower() for answer in question["answers"])
