"""Three ways to add knowledge to a language model, in JAX, compared on one bill."""

__version__ = "0.1.0"
