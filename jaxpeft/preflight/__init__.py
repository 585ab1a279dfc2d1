"""Compile a run's programs for a TPU without TPU hardware, and report whether they fit, their costs and their limits."""
