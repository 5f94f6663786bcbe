"""The training loop that all models share: schedule, EMA, checkpoints, processes and log."""
