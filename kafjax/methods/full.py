"""`full`: all weights of the blocks are trained on the corpus (full-parameter fine-tuning)."""

from __future__ import annotations

from kafjax import hub
from kafjax.evaluation.cost import train_flops_full
from kafjax.methods.trained import Trained
from kafjax.ops.quantized import refuse_quantized


class Full(Trained):
    """Trains the model's own parameters, and answers with them."""

    @property
    def described(self) -> str:
        frozen = ", embedding frozen" if self.lab.settings.train.freeze_embedding else ""
        return f"all weights trained{frozen}, learning rate {self.learning_rate:g}, no passages"

    @property
    def learning_rate(self) -> float:
        return self.lab.settings.lr_full

    def check(self):
        refuse_quantized(self.lab.params, "the method full")
        super().check()

    def save(self, trainable):
        return hub.save_trained(self.folder, trainable)

    def load(self):
        return hub.load_trained(self.folder, self.lab.params)

    def flops(self, result, length):
        embedding_trained = not self.lab.settings.train.freeze_embedding
        return train_flops_full(
            self.lab.shape,
            result.tokens,
            result.targets,
            length,
            embedding_trained=embedding_trained,
        )
