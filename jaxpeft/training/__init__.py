"""Training: objective, optimizer, steps, loop, checkpoints, evaluation."""
