"""The methods under comparison: weights, a reader, or weights with a reader, such as `lora`, `rag`,
`lora+rag`.

Weights say where answers come from without passages, those that train also in which regime
(`regimes`); a reader puts passages into the prompt of some weights. Any two go together. A new one
is a file with a `Method` and a line in `WEIGHTS` or `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from kafjax.core.errors import UserError, nearest
from kafjax.lora.spec import VARIANTS
from kafjax.methods import regimes
from kafjax.methods.base import Base
from kafjax.methods.full import Full
from kafjax.methods.hyde import HyDE
from kafjax.methods.lab import Lab
from kafjax.methods.lora import LoRA
from kafjax.methods.method import Method
from kafjax.methods.oracle import Oracle
from kafjax.methods.rag import RAG
from kafjax.methods.reading import READING, Reading
from kafjax.methods.regimes import REGIMES
from kafjax.methods.rewrite import Rewrite
from kafjax.methods.settings import REPLAY, TRAIN, Settings

BASE = "base"
WEIGHTS: dict[str, Callable[[Lab, str], Method]] = {
    BASE: Base,
    **dict.fromkeys(VARIANTS, LoRA),
    "full": Full,
    **dict.fromkeys(READING, Reading),
    **{f"{name}-{regime}": LoRA for name in VARIANTS for regime in REGIMES if regime},
    **{f"full-{regime}": Full for regime in REGIMES if regime},
}
READERS: dict[str, Callable[[Lab, str, Method], Method]] = {
    "oracle": Oracle,
    "rag": RAG,
    "hyde": HyDE,
    "rewrite": Rewrite,
}

# In the order in which a comparison runs them: the cheap ones first, trained weights before the
# hybrids that use them.
METHODS = ("base", "oracle", "rag", "hyde", "lora", "full", "lora+rag", "full+rag")
"""Methods of a comparison that is not asked for others."""


def parts(name: str) -> tuple[str, str | None]:
    """Splits a method's name into its weights and its reader: `rag` -> `("base", "rag")`, `lora` ->
    `("lora", None)`.

    Raises:
      UserError: naming the nearest, for a name that is neither weights, nor a reader, nor both
        joined by `+`.
    """
    weights, plus, reader = name.partition("+")
    if not plus and weights in READERS:
        weights, reader = BASE, weights
    elif not plus:
        reader = ""
    if (
        weights in WEIGHTS
        and (reader in READERS or not (plus or reader))
        and name != f"{BASE}+{reader}"
    ):
        return weights, reader or None
    names = [*WEIGHTS, *READERS, *(f"{w}+{r}" for w in WEIGHTS for r in READERS if w != BASE)]
    close = nearest(name, names)
    plain = ", ".join(weights for weights in WEIGHTS if not regimes.split(weights)[1])
    hint = (
        close
        if close.startswith("Did")
        else f"Weights: {plain}; readers: {', '.join(READERS)}; or WEIGHTS+READER."
    )
    raise UserError(f"unknown method '{name[:60]}'. {hint}")


def open_method(lab: Lab, name: str) -> Method:
    """Makes a method by name. Raises `UserError` as `parts` does."""
    weights, reader = parts(name)
    made = WEIGHTS[weights](lab, weights)
    return made if reader is None else READERS[reader](lab, name, made)


def in_running_order(names: list[str]) -> list[str]:
    """Sorts methods so that the cheap ones come first and trained weights before the hybrids that
    use them; each once."""
    for name in names:
        parts(name)

    def place(name: str) -> tuple[bool, bool, int, int]:
        weights, reader = parts(name)
        trained = weights != BASE
        return (
            trained,
            trained and reader is not None,
            list(WEIGHTS).index(weights),
            list(READERS).index(reader) if reader else -1,
        )

    return sorted(dict.fromkeys(names), key=place)


__all__ = [
    "METHODS",
    "READERS",
    "READING",
    "REPLAY",
    "TRAIN",
    "WEIGHTS",
    "Lab",
    "Method",
    "Settings",
    "in_running_order",
    "open_method",
    "parts",
]
