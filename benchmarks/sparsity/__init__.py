"""What sparsity pays: measurements of sparse adapters, and of steps that leave channels of the base out."""
