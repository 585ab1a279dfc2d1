"""Compare methods: a grid of runs from one file, which can be resumed, and one report."""
