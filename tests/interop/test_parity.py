"""Every method and option beside torch PEFT's: logits both ways, bytes, gradients, and a hundred updates."""

import functools

import chex
import jax
import numpy as np
import optax
import parity
import pytest
import torch_side
from parity_cases import CASES
from tiers import slow_but

from jaxpeft import Lora, load_adapter
from jaxpeft.training.optimizer import LoraPlus, build_optimizer

TRAINING = [name for name, case in CASES.items() if case.trains]
# One of each of PEFT's types, and of the methods whose products differ most.
FAST = (
    *("lora-list", "hira", "ia3", "vera", "loha", "lokr", "adalora", "ln-tuning", "bitfit", "prompt-tuning"),
    *("shira", "supra", "tags", "tags-distilbert", "encoder-lora"),
)
FAST_TRAINING = ("lora-list", "dora", "hira", "tags", "tags-distilbert", "encoder-lora")


def cases(names, *fast):
    """Parameters, all slow but `fast`; those of one architecture are tested by one worker, which makes its base once."""
    group = {name: pytest.mark.xdist_group(f"parity-{CASES[name].model_type}") for name in names}
    return [pytest.param(*p.values, id=p.id, marks=[group[p.id], *p.marks]) for p in slow_but(names, *fast)]


@pytest.fixture(scope="session")
def compared(bases, tmp_path_factory):
    """A function: a case's name → the pair, moved by noise, our logits, and the gradients of our loss; made once."""

    @functools.cache
    def make(name):
        case = CASES[name]
        base, model = bases(case.model_type, case.task)
        pair = parity.make_pair(case, base, model, tmp_path_factory.mktemp(name) / "theirs", trained=True)

        @functools.partial(jax.grad, has_aux=True)
        def gradients_and_logits(adapters):
            logits = pair.logits(adapters)
            return parity.our_loss(logits, pair, case.task), logits

        gradients, logits = jax.jit(gradients_and_logits)(pair.adapters)
        return base, pair, logits, gradients

    return make


def assert_same_logits(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", cases(CASES, *FAST))
def test_logits_and_files_both_ways(name, compared, tmp_path):
    case = CASES[name]
    base, pair, logits, _ = compared(name)
    theirs = torch_side.torch_logits(pair.peft, pair.inputs)
    assert np.abs(theirs - parity.silenced(pair)).max() > 1e-3  # it says something
    assert_same_logits(logits, theirs)

    pair.save(tmp_path / "ours", pair.adapters)
    before, after = (
        parity.without_copies(torch_side.tensors_of(pair.directory)),
        torch_side.tensors_of(tmp_path / "ours"),
    )
    assert {key: tensor.tobytes() for key, tensor in after.items()} == {
        key: tensor.tobytes() for key, tensor in before.items()
    }
    assert parity.config_meaning(case, tmp_path / "ours") == parity.config_meaning(case, pair.directory)
    again = torch_side.load_peft(torch_side.load_torch(base, case.task), tmp_path / "ours")
    np.testing.assert_array_equal(torch_side.torch_logits(again, pair.inputs), theirs)
    _, adapters, method = load_adapter(tmp_path / "ours", pair.model.params)
    assert method == pair.method
    chex.assert_trees_all_equal(adapters, pair.adapters)


@pytest.mark.parametrize("name", cases(CASES, *FAST))
def test_gradients_are_torch_s(name, compared, tmp_path):
    case = CASES[name]
    _, pair, _, gradients = compared(name)
    pair.peft.zero_grad()
    parity.torch_loss(torch_side.logits_of(pair.peft(**parity.torch_inputs(pair))), pair, case.task).backward()
    grads = {n: p.grad for n, p in pair.peft.named_parameters() if p.grad is not None and p.requires_grad}
    theirs = parity.peft_tensors(pair.peft, grads)
    ours = torch_side.tensors_of(pair.save(tmp_path / "ours", gradients))
    assert ours.keys() == theirs.keys()
    scale = max(np.abs(tensor).max() for tensor in theirs.values())
    for key, expected in theirs.items():
        # The bias of the keys shifts all scores of a softmax alike: its gradient is rounding on both sides.
        zero = np.abs(expected).max() < 1e-6 * scale
        assert (
            (np.abs(ours[key]).max() < 1e-5 * scale) if zero else (parity.relative_error(ours[key], expected) < 1e-4)
        ), key


@pytest.mark.parametrize("name", cases(TRAINING, *FAST_TRAINING))
def test_a_hundred_updates_of_adamw(name, shallow_bases, tmp_path):
    import torch

    case = CASES[name]
    base, model = shallow_bases(case.model_type, case.task)
    pair = parity.make_pair(case, base, model, tmp_path / "theirs", trained=False)
    trained = [parameter for parameter in pair.peft.parameters() if parameter.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    assert_same_training(pair, case, theirs, optax.adamw(1e-3, weight_decay=0.01), tmp_path / "ours")


@pytest.mark.slow
def test_lora_plus(shallow_bases, tmp_path):
    """The same with PEFT's own optimizer: B and vectors faster, adapted embeddings slower."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    case = CASES["embeddings-dora"]
    base, model = shallow_bases(case.model_type, case.task)
    pair = parity.make_pair(case, base, model, tmp_path / "theirs", trained=False)
    theirs = create_loraplus_optimizer(
        pair.peft,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8,
        loraplus_lr_embedding=1e-4,
        loraplus_weight_decay=0.01,
    )
    embeddings = frozenset(path for path in pair.adapters["sites"] if path.endswith("embeddings"))
    assert len(embeddings) == 2
    plus = LoraPlus(8, Lora.loraplus, 0.1, embeddings)
    ours = build_optimizer(optax.constant_schedule(1e-3), weight_decay=0.01, max_grad_norm=0.0, lora_plus=plus)
    assert_same_training(pair, case, theirs, ours, tmp_path / "ours")


def assert_same_training(pair, case, theirs, ours, directory):
    """A hundred updates on one batch: losses to 1e-4, the adapter's weights to 1e-3.

    Both sides in float64: Adam makes whole steps of what float32 rounds, and what it rounds depends on the processor.
    """
    pair.peft.double()
    inputs = parity.torch_inputs(pair)
    ours = optax.with_extra_args_support(ours)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double = parity.in_float64(pair)
        adapters = double.adapters
        state = ours.init(adapters)

        @jax.jit
        def step(adapters, state):
            loss, gradients = jax.value_and_grad(lambda a: parity.our_loss(double.logits(a), pair, case.task))(adapters)
            updates, state = ours.update(gradients, state, adapters, masks={})
            return optax.apply_updates(adapters, updates), state, loss

        first = float(parity.our_loss(double.logits(adapters), pair, case.task))
        for i in range(100):
            loss = parity.torch_loss(torch_side.logits_of(pair.peft(**inputs)), pair, case.task)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            adapters, state, our_loss = step(adapters, state)
            assert abs(float(our_loss) - loss.item()) < 1e-4, f"update {i}"
        assert loss.item() < 0.99 * first  # it learned
        adapters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapters)
    written = torch_side.tensors_of(pair.save(directory, adapters))
    for key, expected in parity.peft_tensors(pair.peft, {}).items():
        if not key.endswith(("key.bias", "key.base_layer.bias", "k_lin.bias")):  # Adam makes steps of its rounding
            assert parity.relative_error(written[key], expected) < 1e-3, key
