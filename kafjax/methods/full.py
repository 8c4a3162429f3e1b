"""`full`: all weights of the blocks are trained on the corpus (full-parameter fine-tuning)."""

from __future__ import annotations

import numpy as np
import safetensors.numpy

from kafjax.core import trees
from kafjax.core.rundir import write_atomic
from kafjax.evaluation.cost import train_flops_full
from kafjax.methods.trained import Trained
from kafjax.ops.quantized import refuse_quantized
from kafjax.training import updated


class Full(Trained):
    kind = "full"

    @property
    def note(self) -> str:
        frozen = ", embedding frozen" if self.lab.settings.freeze_embedding else ""
        return f"all weights trained{frozen}, learning rate {self.learning_rate:g}, no passages"

    @property
    def learning_rate(self) -> float:
        return self.lab.settings.lr_full

    def check(self):
        refuse_quantized(self.lab.params, "the method full")
        super().check()

    @property
    def _file(self):
        return self.folder / "weights.safetensors"

    def save(self, trainable):
        arrays = {path: np.asarray(leaf) for path, leaf in trees.flatten(trainable).items()}
        write_atomic(self._file, safetensors.numpy.save(arrays))
        return self._file.stat().st_size

    def load(self):
        return updated(self.lab.params, trees.unflatten(safetensors.numpy.load_file(self._file)))

    def flops(self, result, length):
        embedding_trained = not self.lab.settings.freeze_embedding
        return train_flops_full(self.lab.shape, result.tokens, result.targets, length, embedding_trained=embedding_trained)
