"""`lora`: a low-rank adapter is trained beside the frozen model, and merged into it to answer."""

from __future__ import annotations

from kafjax import lora
from kafjax.evaluation.cost import train_flops_lora
from kafjax.methods.trained import Trained


class LoRA(Trained):
    kind = "lora"

    @property
    def spec(self) -> lora.Spec:
        settings = self.lab.settings
        return lora.Spec(settings.rank, settings.alpha, settings.targets)

    @property
    def note(self) -> str:
        spec = self.spec
        return f"adapter of rank {spec.rank}, alpha {spec.alpha:g}, learning rate {self.learning_rate:g}, merged to answer, no passages"

    @property
    def learning_rate(self) -> float:
        return self.lab.settings.lr_lora

    @property
    def _file(self):
        return self.folder / "adapter.safetensors"

    def save(self, trainable):
        lora.save(self._file, trainable, self.spec)
        return self._file.stat().st_size

    def load(self):
        adapters, spec = lora.load(self._file, self.lab.params)
        return lora.merge(self.lab.params, adapters, spec)

    def flops(self, result, length):
        return train_flops_lora(self.lab.shape, result.tokens, result.targets, length, adapter_params=result.trainable_parameters)
