"""PEFT's stored adapters give PEFT's stored logits; nothing here needs torch (`make_golden.py` wrote them, and says how)."""

from pathlib import Path

import numpy as np
import parity
import pytest
import torch_side
from make_golden import GOLDEN, load_shallow
from parity_cases import CASES
from tiers import slow_but

from jaxpeft import apply, load_adapter
from jaxpeft.interop.peft import FORMATS

NAMES = sorted(path.name for path in Path(GOLDEN).iterdir())


@pytest.mark.parametrize("name", slow_but(NAMES, *NAMES[::3]))
def test_the_stored_adapter_gives_the_stored_logits(name, tiny_models):
    kind = CASES[name].model_type
    model = load_shallow(tiny_models, kind)
    frozen, adapters, method = load_adapter(GOLDEN / name, model.params)
    inputs = model.inputs(torch_side.batch(kind), **parity.room_for(method))
    logits = apply(model.module, frozen, adapters, method, **inputs).logits
    np.testing.assert_allclose(logits, np.load(GOLDEN / name / "logits.npy"), rtol=0, atol=1e-5)


def test_every_classification_case_and_every_format_is_stored():
    assert set(NAMES) == {name for name, case in CASES.items() if case.task == "classification"}
    stored = {torch_side.config_of(GOLDEN / name)["peft_type"] for name in NAMES}
    assert stored == {form.peft_type for form in FORMATS.values()}
