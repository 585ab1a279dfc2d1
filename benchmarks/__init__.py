"""Measured claims of the README, each re-runnable by one command."""
