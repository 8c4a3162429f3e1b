"""Speed beside the neighbours, both in one run on one machine. Runs from the checkout: `python -m
benchmarks.NAME`."""
