"""docs/sparsity.md: its torch function makes of a packed adapter what PEFT loads."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_side
from trained import Case, our_logits

from jaxpeft import BaseInfo, load_adapter, save_adapter, save_model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sparsity.md").read_text()


@pytest.fixture(scope="module", name="unpack")
def _unpack():
    (code,) = re.findall(r"```python\n(import json.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(code, "docs/sparsity.md", "exec"), names)
    return names["unpack"]


def test_the_function_has_at_most_20_lines():
    (code,) = re.findall(r"```python\n(import json.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 20


def test_peft_loads_what_the_page_s_function_writes(unpack, trained, tmp_path):
    run = trained(Case("distilbert", "sparse", head="old"))
    base = save_model(tmp_path / "base", run.model, run.model.params).parent
    save_adapter(
        tmp_path / "packed",
        run.adapters,
        run.adapted.method,
        base=BaseInfo.of(run.model),
        masks=run.masks,
        target_modules=run.adapted.target_modules,
        packed=True,
    )
    unpack(tmp_path / "packed", tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == {
        path.name: path.read_bytes() for path in run.directory.iterdir()
    }
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path / "adapter")
    np.testing.assert_allclose(torch_side.torch_logits(peft, run.inputs), run.logits(), rtol=0, atol=1e-5)
    frozen, adapters, method = load_adapter(tmp_path / "packed", run.model.params)
    ours = our_logits(run.model, frozen=frozen, adapters=adapters, method=method, inputs=run.inputs)
    np.testing.assert_array_equal(ours, run.logits())
    jax.tree.map(np.testing.assert_array_equal, adapters, run.adapters)


def test_peft_refuses_a_packed_adapter(trained, tmp_path):
    from peft import PeftModel

    run = trained(Case("distilbert", "sparse", head="old"))
    save_adapter(tmp_path, run.adapters, run.adapted.method, base=BaseInfo.of(run.model), masks=run.masks, packed=True)
    # PEFT asks the hub for a file that it does not find, and a path is no name of a repository.
    with pytest.raises(ValueError, match="Repo id must"):
        PeftModel.from_pretrained(torch_side.load_torch(run.base), str(tmp_path))
