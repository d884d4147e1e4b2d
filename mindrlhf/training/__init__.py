"""Training runs: plan, memory, dry run, trainer and its callbacks."""
