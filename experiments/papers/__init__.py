"""Papers as claims that can fail: `python -m experiments.papers.NAME --scale=tiny`.

Each paper is one file with a `Card` (`card.py`): the claim, the design, the paper's own numbers, a
sweep at each scale and a list of claims. `reproduce.py` runs any of them; docs/papers/adding.md
shows how to add one.
"""
