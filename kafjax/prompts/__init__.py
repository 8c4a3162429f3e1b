"""Prompts of every method: as plain text for base models, as turns of a chat for instruct
models."""
