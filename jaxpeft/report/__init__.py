"""The output of a run: console lines, logs, curves, results and the model card."""
