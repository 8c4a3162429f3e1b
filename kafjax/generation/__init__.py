"""Generation: prefill and decode as two compiled programs, with text on both ends."""

from kafjax.generation.generator import Generation, Generator, Prefix
from kafjax.generation.sample import Sampling

__all__ = ["Generation", "Generator", "Prefix", "Sampling"]
