"""The part that `full` and `lora` share: train once, keep the result, find it again."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any

from kafjax import lora
from kafjax.core import trees
from kafjax.core.rundir import write_json
from kafjax.core.schema import Amount, Count, read
from kafjax.evaluation.cost import Cost
from kafjax.methods import regimes
from kafjax.methods.examples import training_examples
from kafjax.methods.lab import Lab
from kafjax.methods.method import ClosedBook
from kafjax.training import Example, TrainConfig, TrainResult, discard_checkpoints, train
from kafjax.training.took import Took


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Learned(Took):
    """Contents of `learned.json`: what training took, its FLOPs by formula, and the bytes that are
    kept."""

    train_flops_formula: Amount
    artifact_bytes: Count


class Trained(ClosedBook):
    """Answers closed-book, with weights trained on the corpus."""

    def __init__(self, lab: Lab, name: str):
        super().__init__(lab, name)
        self.kind, self.regime = regimes.split(name)
        self.folder = lab.folder / name  # where a hybrid finds what the plain method has trained
        self._params: trees.Tree | None = None

    @property
    def spec(self) -> lora.Spec | None:
        """The adapter's spec; None where all weights are trained."""
        return None

    def examples(self) -> list[list[Example]]:
        """Makes what is trained on: lists of examples, one an epoch, in turn."""
        lab = self.lab
        corpus, settings = regimes.in_regime(lab.corpus, lab.settings, self.regime)
        return training_examples(
            corpus, lab.tokenizer, settings, lab.model.config.text_end, lab.prompts
        )

    @property
    def start(self) -> lora.Adapters | None:
        """Adapters that training goes on from; None to begin with new ones."""
        return None

    @property
    def params(self) -> trees.Tree:
        if self._params is None:
            raise RuntimeError(f"{self.name} has not learned yet")
        return self._params

    @property
    @abc.abstractmethod
    def learning_rate(self) -> float: ...

    @abc.abstractmethod
    def save(self, trainable: Any) -> int:
        """Writes the trained weights or the adapter and returns its bytes."""

    @abc.abstractmethod
    def load(self) -> trees.Tree:
        """Loads the weights to answer with."""

    @abc.abstractmethod
    def flops(self, result: TrainResult, length: int) -> float:
        """Training FLOPs by formula, for sequences of about `length` tokens."""

    def check(self) -> None:
        if self.is_trained:
            return
        _ = self._config
        regimes.in_regime(self.lab.corpus, self.lab.settings, self.regime)
        if self.spec is not None:
            lora.abstract(self.spec, self.lab.params)

    @property
    def is_trained(self) -> bool:
        return self._params is not None or self._record.exists()

    @property
    def note(self) -> str:
        return "; ".join(filter(None, (regimes.REGIMES[self.regime], self.described)))

    @property
    @abc.abstractmethod
    def described(self) -> str:
        """Tells what trains, and how, for the note."""

    def learn(self) -> None:
        if not self.is_trained:
            self._train()
        if self._params is None:
            self._params = self.load()

    def adopt(self, folder: Path) -> None:
        """Takes over the weights or the adapter that another training left in `folder`."""
        self.folder = folder
        self._params = self.load()

    @property
    def _record(self) -> Path:
        return self.folder / "learned.json"

    @property
    def _config(self) -> TrainConfig:
        return dataclasses.replace(self.lab.settings.train, learning_rate=self.learning_rate)

    def _train(self) -> None:
        lab = self.lab
        variants = self.examples()
        lengths = [len(example.tokens) for examples in variants for example in examples]
        result = train(
            lab.model,
            lab.params,
            variants,
            self._config,
            spec=self.spec,
            mesh=lab.mesh,
            run_dir=self.folder,
            log=lambda **row: lab.log(method=self.name, **row),
            label=self.name,
            start=self.start,
        )
        kept = self.save(result.trainable)
        formula = self.flops(result, round(sum(lengths) / len(lengths)))
        write_json(
            self._record,
            {"artifact_bytes": kept, "train_flops_formula": formula, **result.record()},
        )
        discard_checkpoints(self.folder)

    def cost(self) -> Cost:
        record = read(_Learned, self._record, fix=f"delete {self.folder} to train again")
        return Cost(
            trainable_parameters=record.trainable_parameters,
            adapter_only=self.spec is not None,
            optimizer_bytes=record.optimizer_bytes,
            train_tokens=record.tokens,
            train_flops_formula=record.train_flops_formula,
            train_flops_measured=record.flops_measured,
            train_flops_useful=record.flops_useful,
            train_seconds=record.seconds,
            compile_seconds=record.compile_seconds,
            train_memory_bytes=None
            if record.argument_bytes is None or record.temporary_bytes is None
            else record.argument_bytes + record.temporary_bytes,
            peak_memory_bytes=record.peak_memory_bytes,
            artifact_bytes=record.artifact_bytes,
        )
