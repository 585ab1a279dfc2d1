"""A run's programs compiled for a TPU that is not here: whether they fit, what they cost, what limits them."""
