"""Fine-tune a Flax transformer with adapters: `python train.py --help`. Without flags: the quickstart."""

from pathlib import Path

from jaxpeft.cli.train import main

if __name__ == "__main__":
    main(prog="train.py", default_config=Path(__file__).parent / "configs" / "quickstart.yaml")
