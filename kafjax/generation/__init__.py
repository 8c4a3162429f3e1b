"""Generation: prefill and decode as two compiled programs, with text on both ends."""

from kafjax.generation.generator import Generator
from kafjax.generation.prefix import Prefix
from kafjax.generation.reply import Generation
from kafjax.generation.sample import Sampling

__all__ = ["Generation", "Generator", "Prefix", "Sampling"]
