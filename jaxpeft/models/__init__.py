"""Flax models of transformers: where they come from, and how they are built."""
