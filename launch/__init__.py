"""Sweeps: one spec of many runs, a ledger that workers race over, and the engines that start
them."""
