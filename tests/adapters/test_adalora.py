"""AdaLoRA beside torch PEFT's, over a hundred updates in which ranks are reallocated; and its schedule by hand."""

import json
import warnings
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch_side
from tiers import slow

from jaxpeft import BaseInfo, load_adapter, load_model, save_adapter
from jaxpeft.adapters import AdaLora, Lora, Site
from jaxpeft.config import AdapterConfig, DataConfig, PruningConfig, RunConfig, TrainingConfig
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.merging import merge
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.masks import sparsity_of
from jaxpeft.runs.schedule import make_plan
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import allocate_step, init_state, make_train_step

STEPS = 100
OPTIONS = {
    "init_r": 6,
    "target_r": 2,
    "tinit": 10,
    "tfinal": 20,
    "deltaT": 5,
    "total_step": STEPS,
    "orth_reg_weight": 0.3,
}
TARGETS = {"bert": ["query", "value", "intermediate.dense"], "distilbert": ["q_lin", "out_lin", "lin2"]}
SCHEDULE = Allocation(init_r=6, target_r=2, begin_step=10, last_step=80, every_steps=5, beta1=0.85, beta2=0.85)


def labelled(model_type, i):
    """A batch with labels; both sides see the same four in turn."""
    inputs = torch_side.batch(model_type)
    ids = np.random.default_rng(i % 4).integers(5, tiny.VOCABULARY, inputs["input_ids"].shape).astype(np.int32)
    labels = (ids[:, 0] % 2).astype(np.int32)
    return {**inputs, "input_ids": ids, "labels": labels, "weights": np.ones(len(labels), np.float32)}


class Theirs:
    """PEFT's AdaLoRA in training, as its documentation trains: backward, step, update_and_allocate."""

    def __init__(self, base, model_type, *, max_grad_norm, accumulation_steps, learning_rate):
        import peft
        import torch

        torch.manual_seed(3)
        config = peft.AdaLoraConfig(task_type="SEQ_CLS", lora_alpha=16, target_modules=TARGETS[model_type], **OPTIONS)
        self.model = peft.get_peft_model(torch_side.load_torch(base, "classification"), config).eval()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0)
        self.max_grad_norm, self.accumulation_steps, self.model_type = max_grad_norm, accumulation_steps, model_type

    def update(self, number):
        """The mean loss of update `number`, from 1."""
        import torch

        losses = []
        for i in range(self.accumulation_steps):
            batch = labelled(self.model_type, (number - 1) * self.accumulation_steps + i)
            names = (
                "input_ids",
                "attention_mask",
                "labels",
                *(["token_type_ids"] if self.model_type == "bert" else []),
            )
            loss = self.model(**{name: torch.tensor(batch[name], dtype=torch.long) for name in names}).loss
            (loss / self.accumulation_steps).backward()
            losses.append(loss.item())
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.model.base_model.update_and_allocate(number)
        self.optimizer.zero_grad()
        return np.mean(losses)

    def save(self, directory):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a layer that is left without a triplet
            self.model.save_pretrained(directory)
        return directory


def in_peft(base, directory):
    """The base with the adapter in `directory`; of a cut one PEFT cannot set the tensors twice, as `load_peft` does."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT looks for the keys of rank_pattern as if they were LoRA's, and heeds them all the same.
        warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match .*lora_E")
        return PeftModel.from_pretrained(torch_side.load_torch(base, "classification"), directory).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(model_type):
        if model_type not in made:
            directory = torch_side.write_base(tmp_path_factory.mktemp("base"), model_type, "classification", layers=1)
            made[model_type] = directory, load_model(str(directory), "classification", dropout=0.0)
        return made[model_type]

    return base


@slow
@pytest.mark.parametrize(
    ("model_type", "max_grad_norm", "accumulation_steps"), [("bert", 0.0, 1), ("distilbert", 0.5, 2)]
)
def test_a_hundred_updates_of_peft_s_with_reallocation(bases, tmp_path, model_type, max_grad_norm, accumulation_steps):
    """Losses with the penalty, weights, and which triplets are left; from there the files are each other's."""
    base, model = bases(model_type)
    options = {"max_grad_norm": max_grad_norm, "accumulation_steps": accumulation_steps}
    theirs = Theirs(base, model_type, learning_rate=3e-3, **options)
    frozen, adapters, method = load_adapter(theirs.save(tmp_path / "start"), model.params)
    assert method == AdaLora(alpha=16, **OPTIONS)
    optimizer = build_optimizer(optax.constant_schedule(3e-3), weight_decay=0.0, **options)
    state = init_state(adapters, optimizer, jax.random.key(0), pruned=False, allocated=True)
    step = make_train_step(
        Objective(model, method, tiny.task_of(model)), optimizer, allocation=SCHEDULE, max_grad_norm=max_grad_norm
    )
    losses, alive = [], {}
    for number in range(1, STEPS + 1):
        passes = []
        for i in range(accumulation_steps):
            batch = labelled(model_type, (number - 1) * accumulation_steps + i)
            state, metrics = step(state, frozen, batch)
            passes.append(float(metrics["loss"]))
        if SCHEDULE.due(number):
            state = allocate_step(state, SCHEDULE.budget_at(number, 3), number == SCHEDULE.last_step)
            alive[number] = sum(int((site["e"] != 0).sum()) for site in state.adapters["sites"].values())
        losses.append(np.mean(passes))
        assert abs(losses[-1] - theirs.update(number)) < 1e-4, f"update {number}"
    assert losses[-1] < 0.8 * losses[0]
    assert [alive[number] for number in (15, 45, 80)] == [15, 7, 6]  # of 18, along the cubic
    assert sparsity_of(state.masks) == pytest.approx(12 / 18)

    save_adapter(tmp_path / "ours", state.adapters, method, base=BaseInfo.of(model), masks=state.masks)
    theirs.save(tmp_path / "theirs")
    ours, expected = torch_side.tensors_of(tmp_path / "ours"), torch_side.tensors_of(tmp_path / "theirs")
    pattern = torch_side.config_of(tmp_path / "ours")["rank_pattern"]
    assert pattern == torch_side.config_of(tmp_path / "theirs")["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 6
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].shape == tensor.shape
        if tensor.size:
            assert np.abs(ours[key] - tensor).max() < 1e-3 * np.abs(tensor).max(), key

    inputs = torch_side.batch(model_type)
    trained = torch_side.torch_logits(theirs.model, inputs)
    again = in_peft(base, tmp_path / "ours")
    np.testing.assert_allclose(
        torch_side.torch_logits(again, inputs), logits(model, state, frozen, method, inputs), atol=1e-5
    )
    # PEFT's own file: what it trained, and bytes that stay.
    frozen, adapters, method = load_adapter(tmp_path / "theirs", model.params)
    out = apply(model.module, frozen, adapters, method, **model.inputs(inputs)).logits
    np.testing.assert_allclose(out, trained, atol=1e-5)
    save_adapter(tmp_path / "back", adapters, method, base=BaseInfo.of(model))
    assert torch_side.config_of(tmp_path / "back")["rank_pattern"] == pattern
    assert {k: v.tobytes() for k, v in torch_side.tensors_of(tmp_path / "back").items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


def logits(model, state, frozen, method, inputs):
    return apply(model.module, frozen, state.adapters, method, masks=state.masks, **model.inputs(inputs)).logits


def test_a_file_from_the_middle_of_the_schedule_is_what_peft_makes_of_it(bases, tmp_path):
    """Triplets that have grown again since the last allocation are not in it; the scaling is that of init_r all the same."""
    base, model = bases("bert")
    theirs = Theirs(base, "bert", max_grad_norm=0.0, accumulation_steps=1, learning_rate=3e-2)
    for number in range(1, 63):
        theirs.update(number)
    theirs.save(tmp_path)
    inputs = torch_side.batch("bert")
    again = in_peft(base, tmp_path)
    frozen, adapters, method = load_adapter(tmp_path, model.params)
    assert (
        sum(site["e"].size for site in adapters["sites"].values()) == sum(map(sum, method.rank_pattern.values())) < 18
    )
    out = apply(model.module, frozen, adapters, method, **model.inputs(inputs)).logits
    np.testing.assert_allclose(out, torch_side.torch_logits(again, inputs), atol=1e-5)
    merged = merge(frozen, adapters, method)
    np.testing.assert_allclose(model.module.apply({"params": merged}, **model.inputs(inputs)).logits, out, atol=1e-5)


def test_the_penalty_is_the_mean_distance_from_orthogonality():
    method = AdaLora(init_r=2, target_r=1, orth_reg_weight=0.5)
    a, b = jnp.eye(3)[:, :2], jnp.array([[2.0, 0, 0], [0, 1, 0]])
    sites = {"layer": {"a": a, "b": b, "e": jnp.zeros((1, 2))}}
    assert float(method.penalty(sites)) == pytest.approx(0.5 * (0 + 3) / 2)  # ‖diag(4, 1) − I‖ = 3
    chex.assert_tree_all_finite(jax.grad(method.penalty)(sites))  # also where a distance is 0
    assert replace(method, orth_reg_weight=0.0).penalty(sites) is None
    assert method.penalty({}) is None


def test_the_penalty_is_in_the_training_loss_and_not_in_the_evaluation():
    method = AdaLora(init_r=4, target_r=2, orth_reg_weight=1.0)
    toy = tiny.Toy()
    toy.module = tiny.Toy.Module(dropout=0.0)
    objective, optimizer, frozen, state = tiny.training(toy, method)
    penalty, batch = float(method.penalty(state.adapters["sites"])), tiny.batch()
    total, weight = objective.loss(objective.logits(frozen, state.adapters, {}, batch), batch)
    sums = objective.statistics(objective.logits(frozen, state.adapters, {}, batch), batch)
    _, metrics = make_train_step(objective, optimizer)(state, frozen, batch)
    assert penalty > 0.5
    assert float(metrics["loss"]) == pytest.approx(float(total / weight) + penalty, rel=1e-6)
    assert float(sums["loss"]) == float(total)


PLAN = Plan(
    num_steps=12,
    accumulation_steps=1,
    log_every_steps=1,
    eval_every_steps=4,
    metric="accuracy",
    learning_rate=lambda step: 1e-2,
    pruning=Allocation(init_r=4, target_r=1, begin_step=2, last_step=9, every_steps=2, beta1=0.85, beta2=0.85),
)


class Quiet:
    def __init__(self):
        self.sparsity = {}

    def write(self, step, split, metrics):
        if split == "train":
            self.sparsity[step] = metrics["sparsity"]

    def advance(self, step):
        pass

    def show(self, step, **figures):
        pass


def run(directory, *, num_steps, progress=None, stop_at=None):
    """`fit` on a toy, to update `stop_at` or to the end, from the checkpoint of `progress` if there is one."""
    method = AdaLora(init_r=4, target_r=1, total_step=12)
    objective, optimizer, frozen, state = tiny.training(tiny.Toy(), method)
    parallel = data_parallel()
    frozen = parallel.replicate(frozen)
    state = parallel.replicate(init_state(state.adapters, optimizer, jax.random.key(7), pruned=False, allocated=True))
    checkpoints, recorder = Checkpoints(directory, "base"), Quiet()
    if progress is not None:
        state, progress = checkpoints.restore(state, progress)
    reached = []
    outcome = tiny.fit(
        state,
        frozen,
        replace(PLAN, num_steps=num_steps),
        progress=progress or Progress(),
        **tiny.fed(make_train_step(objective, optimizer, allocation=PLAN.pruning), parallel),
        validate=lambda state: {"accuracy": 0.5},
        checkpoints=checkpoints,
        metrics_log=recorder,
        bar=recorder,
        stop_requested=lambda: reached.append(0) or (15 if len(reached) == stop_at else None),
    )
    checkpoints.close()
    return outcome, recorder


def test_the_loop_allocates_and_a_resumed_run_allocates_the_same(tmp_path):
    """Triplets that fall before the last allocation are not lost: they grow again. After it they are."""
    whole, recorder = run(tmp_path / "whole", num_steps=12)
    assert [step for step, share in recorder.sparsity.items() if share] == [9, 10, 11, 12]
    assert set(list(recorder.sparsity.values())[8:]) == {1 - 2 / 8}
    assert whole.progress.best_step == 12  # the first validation with the final ranks
    sites, masks = whole.state.adapters["sites"], whole.state.masks
    for path, site in sites.items():
        np.testing.assert_array_equal(site["e"] != 0, masks[path]["e"])
        assert masks[path].keys() == {"e"}
    stopped, _ = run(tmp_path / "parts", num_steps=12, stop_at=5)
    assert stopped.progress.step == 5
    assert all((site["e"] != 0).all() for site in stopped.state.adapters["sites"].values())
    resumed, _ = run(tmp_path / "parts", num_steps=12, progress=5)
    chex.assert_trees_all_equal(tiny.snapshot(resumed.state), tiny.snapshot(whole.state))


def test_one_program_allocates_every_budget():
    method = AdaLora(init_r=4, target_r=1)
    state = tiny.training(tiny.Toy(), method)[3]
    state = init_state(state.adapters, optax.identity(), jax.random.key(0), pruned=False, allocated=True)
    before = allocate_step._cache_size()
    for budget in (8, 5, 3):
        allocate_step(state, budget, False)
    assert allocate_step._cache_size() <= before + 1


def test_pruned_layers_are_cut_twice():
    """A file that was cut, trained on and pruned again says which of the first triplets are left."""
    method = AdaLora(init_r=3, target_r=1, alpha=-1)
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(6.0).reshape(3, 2), "e": jnp.array([[1.0, 2, 3]])}
    kept = {"x/y": {"e": jnp.array([[True, False, True]])}}
    once, sites = method.without_pruned({"x/y": params}, kept)
    assert once.rank_pattern == {"x.y.lora_E": [True, False, True]}
    assert once.alpha == 3  # alpha ≤ 0 means init_r, and stays so
    np.testing.assert_array_equal(sites["x/y"]["e"], [[1, 3]])
    np.testing.assert_array_equal(sites["x/y"]["a"], [[0, 2], [3, 5]])
    twice, sites = once.without_pruned(sites, {"x/y": {"e": jnp.array([[False, True]])}})
    assert twice.rank_pattern == {"x.y.lora_E": [False, False, True]}
    np.testing.assert_array_equal(sites["x/y"]["b"], [[4, 5]])
    assert twice.shapes(Site("x/y", 2, 2)) == {"a": (2, 1), "b": (1, 2), "e": (1, 1)}
    empty, sites = twice.without_pruned(sites, {"x/y": {"e": jnp.array([[False]])}})
    np.testing.assert_array_equal(empty.kernel(jnp.ones((2, 2)), sites["x/y"]), jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": -1}, r"adapter\.target_r is -1; for AdaLoRA it must be at least 0"),
        ({"deltaT": 0}, r"adapter\.deltaT is 0"),
        ({"beta1": 1.0}, r"adapter\.beta1 is 1\.0; for AdaLoRA it must be between 0 and 1"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern needs one bool for each of the init_r"),
    ],
)
def test_options_that_make_no_schedule_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdaLora(**options)


def configured(steps=20, **pruning):
    return RunConfig(
        data=DataConfig(name="python-docs"),
        adapter=AdapterConfig(method="adalora"),
        training=TrainingConfig(num_steps=steps, warmup_steps=2),
        pruning=PruningConfig(**pruning),
    )


def planned(config, method):
    return make_plan(config.training, config.pruning, batches_per_epoch=100, metric="loss", method=method)


def test_a_run_s_plan_prunes_what_its_method_names():
    config = replace(configured(), adapter=AdapterConfig(), pruning=PruningConfig(sparsity=0.5))
    assert planned(config, method=Lora()).pruner.selection.prunable == Lora.prunable == ("a", "b")


def test_a_run_s_plan_has_the_allocation():
    method = AdaLora(tinit=3, tfinal=5, deltaT=2)
    plan = planned(configured(), method=method)
    assert plan.pruning == Allocation(12, 8, begin_step=3, last_step=15, every_steps=2, beta1=0.85, beta2=0.85)
    assert not plan.may_be_best(14)
    assert plan.may_be_best(15)
    assert planned(configured(), method=replace(method, total_step=12)).pruning.last_step == 7
    with pytest.raises(InputError, match=r"ranks fall from step 3 \(adapter\.tinit\) to 2, which is adapter\.tfinal 5"):
        planned(configured(steps=7), method=method)
    with pytest.raises(InputError, match=r"adapter\.options\.total_step 30 exceeds the run's 20 steps"):
        planned(configured(), method=replace(method, total_step=30))
    with pytest.raises(
        InputError, match=r"pruning\.sparsity 0\.5 needs adapter\.method to be one of .*, not 'adalora'"
    ):
        configured(sparsity=0.5)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(InputError, match=r"adapter\.init_r 12 exceeds 8, the width of layer up"):
        AdaLora().init(jax.random.key(0), Site("up", 8, 16), lambda: None)


def test_a_file_needs_the_schedule_s_length(bases, tmp_path):
    _, model = bases("bert")
    _, adapters = tiny.adapted(model, AdaLora())
    with pytest.raises(InputError, match="give the method total_step"):
        save_adapter(tmp_path, adapters, AdaLora(), base=BaseInfo.of(model))


def test_a_broken_pattern_is_refused(bases, tmp_path):
    base, model = bases("bert")
    Theirs(base, "bert", max_grad_norm=0.0, accumulation_steps=1, learning_rate=1e-3).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    pattern = {"bert.encoder.layer.0.attention.self.query.lora_E": [True, False, True, True, True, True]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": pattern}))
    with pytest.raises(InputError, match=r"query has shape \(6, 32\), and .* ask for \(5, 32\)"):
        load_adapter(tmp_path, model.params)
