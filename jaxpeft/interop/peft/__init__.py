"""PEFT's files: an adapter's configuration and weights, both ways."""
