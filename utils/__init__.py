"""What the programs share: data sets, training loop, schedule, checkpoints, records."""
