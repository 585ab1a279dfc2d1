"""Question answering beside torch PEFT: its own loss over fifty updates, its files both ways, and the logits of an exported adapter.

PEFT 0.21's class for this task does not pass token types on. Its model, which has the adapter, takes them (`get_base_model`).
"""

from dataclasses import replace

import jax
import numpy as np
import optax
import parity
import pytest
import torch_side
from parity_cases import Case

from jaxpeft import load_adapter, load_model
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective

TASK = "question-answering"
LORA = {"r": 4, "lora_alpha": 12, "task_type": "QUESTION_ANS"}
CASES = {
    "bert": Case("bert", TASK, "LoraConfig", {**LORA, "target_modules": ["query", "value"]}),
    "distilbert": Case("distilbert", TASK, "LoraConfig", {**LORA, "target_modules": ["q_lin", "v_lin"]}),
}
PROMPT = Case("bert", TASK, "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "QUESTION_ANS"})
UPDATES = 50


def made(case, tmp_path, *, trained=False):
    base = torch_side.write_base(tmp_path / "base", case.model_type, TASK)
    model = load_model(str(base), TASK)
    return base, parity.make_pair(case, base, model, tmp_path / "theirs", trained=trained)


def batches(pair):
    """Five batches with places of answers, some of them [CLS]."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        ids = rng.permutation(pair.inputs["input_ids"].ravel()).reshape(pair.inputs["input_ids"].shape)
        labels = np.sort(rng.integers(0, 8, (len(ids), 2)), axis=1).astype(np.int32)
        labels[0] = 0
        yield {**pair.inputs, "input_ids": ids, "labels": labels, "weights": np.ones(len(ids), np.float32)}


def torch_loss(pair, batch):
    import torch

    places = torch.tensor(batch["labels"], dtype=torch.long)
    inputs = {
        name: torch.tensor(batch[name], dtype=torch.long)
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name != "token_type_ids" or pair.model.model_type == "bert"
    }
    return pair.peft.get_base_model()(**inputs, start_positions=places[:, 0], end_positions=places[:, 1]).loss


@pytest.mark.parametrize("name", CASES)
def test_fifty_updates_and_the_exported_adapter(name, tmp_path):
    """Losses to 1e-4, both sides in float64 as in `test_parity`; logits of the adapter in torch PEFT to 1e-5."""
    import torch

    case = CASES[name]
    base, pair = made(case, tmp_path)
    trained = {n for n, p in pair.peft.named_parameters() if p.requires_grad and "qa_outputs" in n}
    assert len(trained) == 2  # PEFT trains the head by itself, and so do we
    assert {path.split("/")[0] for path in pair.adapters["modules"]} == {"qa_outputs"}
    optimizer = torch.optim.AdamW([p for p in pair.peft.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
    given = list(batches(pair))
    pair.peft.double()
    first = []
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double = parity.in_float64(pair)
        objective = Objective(double.model, double.method, task_for(TASK))
        ours = optax.adamw(3e-3, weight_decay=0.01)
        adapters, state = double.adapters, ours.init(double.adapters)

        @jax.jit
        def step(adapters, state, batch):
            def mean(adapters):
                total, weight = objective.loss(objective.logits(double.frozen, adapters, {}, batch), batch)
                return total / weight

            loss, gradients = jax.value_and_grad(mean)(adapters)
            updates, state = ours.update(gradients, state, adapters)
            return optax.apply_updates(adapters, updates), state, loss

        for i in range(UPDATES):
            batch = given[i % len(given)]
            theirs = torch_loss(pair, batch)
            optimizer.zero_grad()
            theirs.backward()
            optimizer.step()
            adapters, state, loss = step(adapters, state, batch)
            assert abs(float(loss) - theirs.item()) < 1e-4, f"update {i}"
            first.append(theirs.item())
        adapters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapters)
    assert sum(first[-5:]) < 0.9 * sum(first[:5])  # it learned

    pair.save(tmp_path / "ours", adapters)
    config = torch_side.config_of(tmp_path / "ours")
    assert (config["task_type"], config["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])
    loaded = torch_side.load_peft(torch_side.load_torch(base, TASK), tmp_path / "ours")
    assert type(loaded).__name__ == "PeftModelForQuestionAnswering"
    theirs = torch_side.torch_logits(loaded.get_base_model(), pair.inputs)
    plain = torch_side.torch_logits(torch_side.load_torch(base, TASK), pair.inputs)
    assert theirs.shape == (4, 12, 2)
    assert np.abs(theirs - plain).max() > 1e-2
    np.testing.assert_allclose(jax.jit(pair.logits)(adapters), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*CASES, "prompt-tuning"])
def test_logits_of_an_adapter_of_peft_and_the_same_file_again(name, tmp_path):
    case = CASES.get(name, PROMPT)
    _, pair = made(case, tmp_path, trained=True)
    if name == "prompt-tuning":  # only PEFT's own class adds the tokens
        pair = replace(pair, inputs={**pair.inputs, "token_type_ids": 0 * pair.inputs["token_type_ids"]})
    theirs = torch_side.torch_logits(pair.peft if name == "prompt-tuning" else pair.peft.get_base_model(), pair.inputs)
    ours = jax.jit(pair.logits)(pair.adapters)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    pair.save(tmp_path / "ours", pair.adapters)
    before, after = (torch_side.tensors_of(folder) for folder in (pair.directory, tmp_path / "ours"))
    assert {key: value.tobytes() for key, value in after.items()} == {
        key: value.tobytes() for key, value in before.items()
    }
    _, _, method = load_adapter(tmp_path / "ours", pair.model.params)
    assert method == pair.method
    # The task's logits are those of the text, without those of virtual tokens.
    objective = Objective(pair.model, pair.method, task_for(TASK))
    of_text = objective.logits(pair.frozen, pair.adapters, {}, pair.inputs)
    np.testing.assert_allclose(of_text, theirs[:, -12:], rtol=0, atol=1e-5)


def test_peft_s_own_class_still_drops_token_types(tmp_path):
    """`Head.peft_drops_token_types` says so, and model cards go another way. If this fails, both can go."""
    _, pair = made(CASES["bert"], tmp_path, trained=True)
    without = {**pair.inputs, "token_type_ids": 0 * pair.inputs["token_type_ids"]}
    assert pair.inputs["token_type_ids"].any()
    whole = [torch_side.torch_logits(pair.peft, inputs) for inputs in (pair.inputs, without)]
    np.testing.assert_array_equal(*whole)
    assert pair.model.head.peft_drops_token_types
