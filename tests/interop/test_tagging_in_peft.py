"""Token classification in torch PEFT: prompt tuning, and runs of our own task on the same sentences."""

import warnings

import jax
import numpy as np
import optax
import pytest
import tiny_runs
import torch_side

from jaxpeft import BaseInfo, Lora, load_adapter, load_model, save_adapter
from jaxpeft.adapters.build import init_adapters
from jaxpeft.data.token_classification import token_data
from jaxpeft.targets import match_targets
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective

pytest.importorskip("peft", reason="needs peft: pip install -e '.[test]'")

TARGETS = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}
NAMES = ("O", "B-X", "I-X")
SENTENCES = [line.split() for line in tiny_runs.SENTENCES[:24]]
TAGS = [[(len(word) > 6) + (word[0] == "t") for word in words] for words in SENTENCES]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_runs.package_model(), use_fast=True)


def base_of(model_type, directory, **config):
    torch_side.write_base(
        directory, model_type, "token-classification", layers=2, num_labels=3, vocab_size=tiny_runs.VOCABULARY, **config
    )
    return directory, load_model(str(directory), "token-classification", num_labels=3)


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_fifty_updates_on_tagged_sentences(model_type, tokenizer, tmp_path):
    """Our batches of windows and our loss; torch ignores the places without weight. The exported adapter has the same logits."""
    import torch
    from peft import PeftModelForTokenClassification

    base, model = base_of(model_type, tmp_path / "base", **no_dropout(model_type))
    task = task_for("token-classification", 3, NAMES)
    data = token_data(SENTENCES, TAGS, tokenizer, max_length=16, batch_size=4, seed=0, doc_stride=4)
    method = Lora(rank=4, alpha=8)
    head = {"classifier/kernel", "classifier/bias"}
    targets = match_targets(model.sites(), TARGETS[model_type])
    frozen, adapters = init_adapters(model.params, method, targets, rng=jax.random.key(0), fully_trained=head)
    info = BaseInfo.of(model)
    save_adapter(tmp_path / "start", adapters, method, base=info, target_modules=TARGETS[model_type])
    assert torch_side.config_of(tmp_path / "start")["task_type"] == "TOKEN_CLS"
    theirs = torch_side.load_peft(torch_side.load_torch(base, "token-classification"), tmp_path / "start")
    assert isinstance(theirs, PeftModelForTokenClassification)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    optimizer = optax.adamw(5e-3, weight_decay=0.0)
    objective = Objective(model, method, task)

    @jax.jit
    def step(adapters, state, batch):
        def loss(adapters):
            total, weight = objective.loss(objective.logits(frozen, adapters, {}, batch), batch)
            return total / weight

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for i in range(50):
        batch = data.train_batch(i)
        adapters, state, ours = step(adapters, state, batch)
        labels = np.where(batch["weights"] > 0, batch["labels"], -100)
        loss = theirs(**inputs_of(batch, model_type), labels=torch.tensor(labels, dtype=torch.long)).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        losses.append(loss.item())
        assert abs(float(ours) - loss.item()) < 1e-4, f"update {i}"
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])  # it learned
    save_adapter(tmp_path / "end", adapters, method, base=info, target_modules=TARGETS[model_type])
    loaded = torch_side.load_peft(torch_side.load_torch(base, "token-classification"), tmp_path / "end")
    again, read, found = load_adapter(tmp_path / "end", model.params)
    for batch in data.eval_batches():
        ours = jax.jit(objective.logits)(again, read, {}, {k: v for k, v in batch.items() if k != "rows"})
        with torch.no_grad():
            logits = loaded(**inputs_of(batch, model_type)).logits.numpy()
        inside = batch["attention_mask"] > 0
        np.testing.assert_allclose(np.asarray(ours)[inside], logits[inside], rtol=0, atol=1e-5)
    assert found == method


def no_dropout(model_type):
    names = (
        ("dropout", "attention_dropout")
        if model_type == "distilbert"
        else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    )
    return dict.fromkeys(names, 0.0)


def inputs_of(batch, model_type):
    import torch

    names = ["input_ids", "attention_mask", *(["token_type_ids"] if model_type == "bert" else [])]
    return {name: torch.tensor(batch[name], dtype=torch.long) for name in names}


def test_prompt_tuning(tokenizer, tmp_path):
    """PEFT has logits at its virtual tokens too, which have no words."""
    import peft
    import torch

    base, model = base_of("bert", tmp_path / "base")
    torch.manual_seed(3)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(torch_side.load_torch(base, "token-classification"), config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    frozen, adapters, method = load_adapter(tmp_path / "theirs", model.params)
    task = task_for("token-classification", 3, NAMES)
    data = token_data(SENTENCES, TAGS, tokenizer, max_length=16, batch_size=8, seed=0)
    batch = data.train_batch(0)
    ours = jax.jit(Objective(model, method, task).logits)(frozen, adapters, {}, batch)
    with torch.no_grad():
        logits = theirs(**inputs_of(batch, "bert")).logits.numpy()[:, 3:]
    inside = batch["attention_mask"] > 0
    np.testing.assert_allclose(np.asarray(ours)[inside], logits[inside], rtol=0, atol=1e-5)
