"""What starts from data are measured by: EVA's components beside torch PEFT's, ranks by hand, gradients beside the merged model's."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from tiers import slow_but

from jaxpeft import InputError, Lora, S2ft, Shira, apply, load_model, match_targets
from jaxpeft.adapters.build import init_adapters
from jaxpeft.calibration import (
    calibrate,
    components,
    input_components,
    input_magnitudes,
    kernel_gradients,
    record_inputs,
)
from jaxpeft.calibration.incremental_pca import updated
from jaxpeft.quantization import dequantize, quantize
from jaxpeft.trees import leaf_paths, nest

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = torch_side.write_base(tmp_path_factory.mktemp("base"), "bert")
    return directory, load_model(str(directory), "masked-lm")


def torch_batches(labelled):
    """Three batches of 8 rows of 12 tokens, with padding, and maybe a label at two thirds of the tokens."""
    found = []
    for seed in range(3):
        batch = {
            key: value for key, value in tiny.batch(8, seed=seed, length=12).items() if key.endswith(("ids", "mask"))
        }
        if labelled:
            keep = np.random.default_rng(seed).random((8, 12)) < 2 / 3
            batch["labels"] = np.where(keep, batch["input_ids"], -100)
        found.append(batch)
    return found


EVA = {
    "defaults": ({}, {}, False),
    "labels": ({}, {}, True),
    "all-tokens": ({"use_label_mask": False}, {}, True),
    "no-redistribution": ({"rho": 1.0}, {}, False),
    # PEFT whitens in place, what layers share as often as there are layers: so none share here.
    "whiten": (
        {"whiten": True, "adjust_scaling_factors": False, "tau": 0.9},
        {"target_modules": ["query", "output.dense"]},
        False,
    ),
    "patterns": ({"rho": 1.5}, {"rank_pattern": {"query": 2}, "alpha_pattern": {r"0\.output\.dense": 3}}, False),
}


@pytest.mark.parametrize("name", slow_but(EVA, "labels", "patterns"))
def test_eva_is_peft_s(name, base):
    """The same ranks, alphas and layers; each A to 1e-2: both stop at cosines of tau, and PEFT's SVD is randomised."""
    import torch
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    directory, model = base
    options, others, labelled = EVA[name]
    others = {"target_modules": TARGETS, **others}
    patterns = {key: value for key, value in others.items() if key.endswith("pattern")}
    batches = torch_batches(labelled)
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="eva", eva_config=EvaConfig(**options), **others)
    loader = [{key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()} for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the memory it takes
        peft = get_peft_model(torch_side.load_torch(directory), config)
        initialize_lora_eva_weights(peft, loader, show_progress_bar=False)
    theirs = {}
    for key, module in peft.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight
            assert not b.any()
            path = key.removeprefix("base_model.model.").replace(".", "/")
            theirs[path] = a.numpy().T, module.scaling["default"]

    method = Lora(4, 12.0, init_lora_weights="eva", eva_config=options, **patterns)
    found = input_components(model, method, match_targets(model.sites(), others["target_modules"]), batches)
    assert found.targets.keys() == found.components.keys() == theirs.keys()
    assert found.method.rank_pattern == peft.peft_config["default"].rank_pattern
    assert found.method.alpha_pattern == peft.peft_config["default"].alpha_pattern
    for path, (a, scaling) in theirs.items():
        assert found.method.at(path).scaling == pytest.approx(scaling)
        ours = np.asarray(found.components[path])
        assert ours.shape == a.shape
        size = np.linalg.norm(a, axis=0)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=0), size, rtol=1e-2)
        # Their spaces: the singular values of what each has in the other are 1.
        overlap = np.linalg.svd((ours / size).T @ (a / size), compute_uv=False)
        np.testing.assert_allclose(overlap, 1, atol=1e-2)

    frozen, adapters = init_adapters(
        model.params, found.method, found.targets, rng=jax.random.key(0), statistics=found.components
    )
    inputs = model.inputs(torch_side.batch("bert"))
    plain = apply(model.module, model.params, {"sites": {}, "modules": {}}, **inputs).logits
    np.testing.assert_array_equal(apply(model.module, frozen, adapters, found.method, **inputs).logits, plain)
    assert frozen.keys() == model.params.keys()


def test_components_by_batches_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((600, 24)) * 0.7 ** np.arange(24) + rng.standard_normal(24)).astype(np.float32)
    fit = None
    for part in np.split(rows, 6):
        fit = updated(fit, part, 4)
    centred = rows - rows.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    assert fit.count == 600
    np.testing.assert_allclose(fit.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(fit.spread, np.square(centred).sum(), rtol=1e-5)
    np.testing.assert_allclose(fit.singular_values, s[:4], rtol=1e-2)
    np.testing.assert_allclose(np.abs((fit.components * vt[:4]).sum(1)), 1, atol=1e-3)
    np.testing.assert_allclose(fit.explained, s[:4] ** 2 / (s**2).sum(), rtol=2e-2)
    assert (fit.similarity > 0.99).all()


def directions(strengths, seed):
    """A kernel-wide input whose variance lies along the axes, as `strengths` say."""
    rows = tiny.normal(seed, 400, len(strengths)) * np.asarray(strengths, np.float32)
    return rows.reshape(4, 100, -1)


def test_ranks_go_where_the_variance_is_explained(monkeypatch):
    """Two layers of rank 2: one sees a single direction, the other four of one size; of 4 ranks the first gets one."""
    model = tiny.Toy()
    model.params = {
        "up": {"kernel": jnp.zeros((16, 24)), "bias": jnp.zeros(24)},
        "down": {"kernel": jnp.zeros((24, tiny.VOCABULARY)), "bias": jnp.zeros(tiny.VOCABULARY)},
    }
    seen = {
        "up": jnp.asarray(directions([10, *[0.01] * 15], 0)),
        "down": jnp.asarray(directions([5, 4, 3, 2, *[0.01] * 20], 1)),
    }
    monkeypatch.setattr(components, "record_inputs", lambda *_, **__: seen)
    batch = {"input_ids": np.ones((4, 100), np.int32), "attention_mask": np.ones((4, 100), np.int32)}
    method = Lora(2, 4.0, init_lora_weights="eva")
    found = input_components(model, method, model.sites(), [batch])
    assert found.method.rank_pattern == {"up": 1, "down": 3}
    assert found.method.alpha_pattern == {"up": 2.0, "down": 6.0}  # alpha/rank stays
    np.testing.assert_allclose(np.abs(found.components["up"][:, 0]), np.eye(16)[0], atol=1e-2)
    np.testing.assert_allclose(np.abs(found.components["down"]), np.eye(24)[:, :3], atol=0.1)

    # With ranks for the strongest only, a layer may go without.
    lonely = input_components(
        model, Lora(1, 4.0, init_lora_weights="eva", eva_config={"rho": 1.0}), model.sites(), [batch]
    )
    assert lonely.method.rank_pattern == {}
    seen["down"] = jnp.asarray(directions([1.0] * 24, 2))
    seen["up"] = jnp.asarray(directions([10, 9, *[0.01] * 14], 0))
    narrow = input_components(model, Lora(1, 4.0, init_lora_weights="eva"), model.sites(), [batch])
    assert narrow.targets.keys() == narrow.components.keys() == {"up"}
    assert narrow.method.rank_pattern == {"up": 2}


def test_only_tokens_with_weight_and_label_count(bert):
    _counted = components._counted
    batch = tiny.batch(4)
    batch["weights"][0] = 0  # a row that fills the batch up
    batch["weights"][1, 2] = 0
    everywhere = _counted(batch, {"use_label_mask": False})
    np.testing.assert_array_equal(everywhere[1:], batch["attention_mask"][1:])
    assert not everywhere[0].any()
    labelled = _counted(batch, {"use_label_mask": True})
    assert [set(np.nonzero(row)[0]) for row in labelled] == [
        set(),
        set(batch["positions"][1][:2]),
        *({*positions} for positions in batch["positions"][2:]),
    ]
    batch["positions"][1, 2] = batch["positions"][1, 0]  # what fills a row up may repeat a position that counts
    np.testing.assert_array_equal(_counted(batch, {"use_label_mask": True}), labelled)
    rows = tiny.batch(4, task="classification")
    np.testing.assert_array_equal(_counted(rows, {"use_label_mask": True}), rows["attention_mask"])


def test_what_a_layer_sees_is_recorded(tiny_models):
    """By hand for the first layer after the embeddings; through quantised kernels, and in a model that checkpoints gradients."""
    up, down = "bert/encoder/layer/0/intermediate/dense", "bert/encoder/layer/0/output/dense"
    for options in ({}, {"gradient_checkpointing": True}):
        model = tiny_models("bert", **options)
        inputs = model.inputs(tiny.batch(2))
        seen = jax.jit(lambda params, m=model, i=inputs: record_inputs(m.module, params, [up, down], **i))(model.params)
        kernel, bias = (
            model.params["bert"]["encoder"]["layer"]["0"]["intermediate"]["dense"][k] for k in ("kernel", "bias")
        )
        np.testing.assert_allclose(jax.nn.gelu(seen[up] @ kernel + bias, approximate=False), seen[down], atol=1e-5)
    leaves = leaf_paths(model.params)
    stored = quantize(leaves[f"{up}/kernel"])
    for kernel in (stored, dequantize(stored)):
        params = nest({**leaves, f"{up}/kernel": kernel})
        again = record_inputs(model.module, params, [down], **inputs)[down]
        np.testing.assert_allclose(
            jax.nn.gelu(seen[up] @ dequantize(stored) + bias, approximate=False), again, atol=1e-5
        )


def test_gradients_are_those_of_the_whole_model():
    toy, batches = tiny.Toy(), [tiny.batch(seed=i) for i in range(3)]

    def loss(params, batch):
        logits = toy.module.apply({"params": params}, batch["input_ids"]).logits
        return jnp.square(logits).mean()

    found = kernel_gradients(loss, toy.params, toy.sites(), batches)
    expected = [jax.grad(loss)(toy.params, batch) for batch in batches]
    assert found.keys() == {"up", "down"}
    for path, gradient in found.items():
        mean = sum(one[path]["kernel"] for one in expected) / 3
        np.testing.assert_allclose(gradient, mean, rtol=1e-5, atol=1e-7)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.params)
    rough = kernel_gradients(lambda params, batch: loss(params, batch).astype(jnp.float32), half, toy.sites(), batches)
    assert all(gradient.dtype == jnp.float32 for gradient in rough.values())


def never(*_):
    raise AssertionError("no batch is to be looked at")


def test_calibrate_measures_what_the_start_asks_for():
    toy, batches = tiny.Toy(), [tiny.batch(32, seed=i) for i in range(2)]
    plain = calibrate(toy, Lora(4), toy.sites(), [], loss=never)
    assert (plain.method, plain.targets, plain.statistics) == (Lora(4), toy.sites(), {})
    assert calibrate(toy, None, toy.sites(), [], loss=never).statistics == {}

    eva = calibrate(toy, Lora(4, init_lora_weights="eva"), toy.sites(), batches, loss=never)
    assert sum(eva.method.at(path).rank for path in eva.targets) == 8
    loss = lambda params, batch: jnp.square(toy.module.apply({"params": params}, batch["input_ids"]).logits).mean()  # noqa: E731
    gradient = calibrate(toy, Lora(4, init_lora_weights="lora_ga"), toy.sites(), batches, loss=loss)
    for chooses in (Shira(mask_type="gradient"), S2ft(selection="gradient")):
        same = calibrate(toy, chooses, toy.sites(), batches, loss=loss)
        assert same.method == chooses
        jax.tree.map(np.testing.assert_array_equal, same.statistics, gradient.statistics)
    assert {path: statistics.shape for path, statistics in gradient.statistics.items()} == {
        "up": (16, 24),
        "down": (24, 99),
    }
    for found in (eva, gradient):
        _, adapters = init_adapters(
            toy.params, found.method, found.targets, rng=jax.random.key(0), statistics=found.statistics
        )
        assert {path: site["a"].shape[1] for path, site in adapters["sites"].items()} == {
            path: found.method.at(path).rank for path in found.targets
        }


def test_magnitudes_are_means_over_the_tokens_that_the_mask_covers(tiny_models):
    model, batches = tiny_models("bert", config={"num_hidden_layers": 1}), [tiny.batch(2, seed=i) for i in range(2)]
    targets = match_targets(model.sites(), ["output.dense", "query"])
    found = calibrate(model, S2ft(selection="activation"), targets, batches, loss=never)
    assert found.method == S2ft(selection="activation")
    for path, site in targets.items():
        kept = []
        for batch in batches:
            seen = record_inputs(model.module, model.params, [path], **model.inputs(batch))[path]
            kept.append(np.abs(np.asarray(seen))[batch["attention_mask"] > 0])
        np.testing.assert_allclose(found.statistics[path], np.concatenate(kept).mean(axis=0), rtol=1e-5)
        assert found.statistics[path].shape == (site.d_in,)
    with pytest.raises(InputError, match="s2ft needs at least one batch, got none"):
        input_magnitudes(model, targets, [], needed_by="s2ft")


def test_a_layer_without_tokens_counts_its_rows(tiny_models):
    model = tiny_models("bert", "classification", config={"num_hidden_layers": 1})
    targets, batch = match_targets(model.sites(), ["pooler.dense"]), tiny.batch(3, task="classification")
    (found,) = input_magnitudes(model, targets, [batch], needed_by="s2ft").values()
    (seen,) = record_inputs(model.module, model.params, targets, **model.inputs(batch)).values()
    np.testing.assert_allclose(found, np.abs(np.asarray(seen)).mean(axis=0), rtol=1e-5)


REFUSED = {
    "no-batches": ({}, [], "EVA needs at least one batch, got none"),
    "wide": ({"rho": 5.0}, [tiny.batch(32)], r"rho·rank = 5·4 components, but its width is 16: lower eva_config\.rho"),
    "small": (
        {},
        [tiny.batch(2)] * 2,
        "no batch has the 8 tokens that layer up needs .* give larger batches, or set eva_config.use_label",
    ),
    "restless": (
        {"tau": 1.0},
        [tiny.batch(32, seed=i) for i in range(2)],
        "have not converged after 3 passes over 2 batches.*lower eva",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused(name, monkeypatch):
    monkeypatch.setattr(components, "_MAX_PASSES", 3)
    options, batches, message = REFUSED[name]
    toy = tiny.Toy()
    with pytest.raises(InputError, match=message) as caught:
        input_components(toy, Lora(4, init_lora_weights="eva", eva_config=options), toy.sites(), batches)
    assert "\n" not in str(caught.value)


def test_gradients_want_a_batch():
    with pytest.raises(InputError, match="LoRA-GA needs at least one batch, got none"):
        kernel_gradients(never, tiny.Toy().params, tiny.Toy().sites(), [])
