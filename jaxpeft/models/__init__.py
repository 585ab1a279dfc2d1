"""Flax models of transformers: finds their files, builds them, loads their weights, and computes their attention."""
