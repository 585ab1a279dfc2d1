"""Write tests/interop/golden/: PEFT's adapters and logits, for the tests that run without torch.

    PYTHONPATH=tests:tests/interop python tests/interop/make_golden.py        (peft 0.21.2, torch 2.13.0, transformers 4.57.6)

The base is tests/tiny.py's classifier of one layer, whose weights numpy draws from fixed seeds; every adapter is one of
`parity_cases.CASES`, moved by noise.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import parity
import tiny
import torch_side
from parity_cases import CASES

from jaxpeft import save_model

GOLDEN = Path(__file__).parent / "golden"


def load_shallow(load, kind):
    """The golden base: `load` is tiny's loader."""
    depth = "n_layers" if kind == "distilbert" else "num_hidden_layers"
    return load(kind, "classification", config={depth: 1})


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        load = tiny.loader(Path(folder))
        for name, case in CASES.items():
            if case.task == "classification":
                model = load_shallow(load, case.model_type)
                base = save_model(Path(folder) / f"base-{name}", model, model.params).parent
                write(GOLDEN / name, case, base, model)


def write(directory, case, base, model):
    pair = parity.make_pair(case, base, model, directory, trained=True)
    np.save(directory / "logits.npy", torch_side.torch_logits(pair.peft, pair.inputs))
    (directory / "README.md").unlink()
    config = torch_side.config_of(directory)
    config["base_model_name_or_path"] = "tests/tiny.py"
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
