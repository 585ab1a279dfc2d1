"""What a run shows and leaves behind: lines, logs, curves, results, model card."""
