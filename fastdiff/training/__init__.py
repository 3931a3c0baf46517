"""Training: data, trainer, average of weights, checkpoints."""
