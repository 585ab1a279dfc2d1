"""Fine-tune a Flax transformer with adapters: `python train.py --help`. Without flags: the quickstart."""

from pathlib import Path

from jaxpeft.cli import train

if __name__ == "__main__":
    train(prog="train.py", default_config=Path(__file__).parent / "configs" / "quickstart.yaml")
