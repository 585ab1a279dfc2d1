"""How fast, beside torch PEFT: python -m benchmarks.speed (see `benchmarks/README.md`)."""
