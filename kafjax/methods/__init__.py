"""The methods under comparison, by name. A new one is a file with a `Method`, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from kafjax.methods.base import Base
from kafjax.methods.full import Full
from kafjax.methods.hyde import HyDE
from kafjax.methods.lab import Lab
from kafjax.methods.lora import LoRA
from kafjax.methods.method import Method
from kafjax.methods.oracle import Oracle
from kafjax.methods.rag import RAG
from kafjax.methods.settings import Settings
from kafjax.methods.trained import train_config

# In the order in which a comparison runs them: the cheap ones first, trained weights before the hybrids that use them.
METHODS: dict[str, Callable[[Lab], Method]] = {
    "base": lambda lab: Base(lab, "base"),
    "oracle": lambda lab: Oracle(lab, "oracle", Base(lab, "base")),
    "rag": lambda lab: RAG(lab, "rag", Base(lab, "base")),
    "hyde": lambda lab: HyDE(lab, "hyde", Base(lab, "base")),
    "lora": lambda lab: LoRA(lab, "lora"),
    "full": lambda lab: Full(lab, "full"),
    "lora+rag": lambda lab: RAG(lab, "lora+rag", LoRA(lab, "lora")),
    "full+rag": lambda lab: RAG(lab, "full+rag", Full(lab, "full")),
}

__all__ = ["METHODS", "Lab", "Method", "Settings", "train_config"]
