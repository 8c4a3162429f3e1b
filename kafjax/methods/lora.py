"""`lora` and its variants: a low-rank adapter is trained beside the frozen model, and merged into
it to answer."""

from __future__ import annotations

import dataclasses

from kafjax import lora
from kafjax.core.paths import size
from kafjax.evaluation.cost import train_flops_lora
from kafjax.lora.files import ADAPTER
from kafjax.lora.spec import VARIANTS
from kafjax.methods.trained import Trained


class LoRA(Trained):
    """Trains an adapter with the settings' `Spec`. The name of a variant (`dora`, `pissa`, ...)
    sets its fields."""

    @property
    def spec(self) -> lora.Spec:
        return dataclasses.replace(self.lab.settings.spec, **VARIANTS[self.kind])

    @property
    def described(self) -> str:
        spec = self.spec
        on = [
            name
            for name, fields in VARIANTS.items()
            if fields and all(getattr(spec, k) == v for k, v in fields.items())
        ]
        kind = f"{' + '.join(on)} adapter" if on else "adapter"
        return f"{kind} of rank {spec.rank}, alpha {spec.alpha:g}, learning rate {self.learning_rate:g}, merged to answer, no passages"

    @property
    def learning_rate(self) -> float:
        return self.lab.settings.lr_lora

    @property
    def _file(self):
        return self.folder / ADAPTER

    def save(self, trainable):
        lora.save(self._file, trainable, self.spec)
        return size(self._file)

    def load(self):
        adapters, spec = lora.load(self._file, self.lab.params)
        return lora.merge(self.lab.params, adapters, spec)

    def flops(self, result, length):
        return train_flops_lora(
            self.lab.shape,
            result.tokens,
            result.targets,
            length,
            adapter_params=result.trainable_parameters,
        )
