"""Sweeps that people ask for, by name: `python -m launch.sweep rank_rate_seed --dry_run`. Each
defines `sweep`."""
