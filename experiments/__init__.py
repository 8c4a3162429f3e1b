"""Command-line experiments: short absl mains over `kafjax`. Each explains itself with --help."""
