"""LoRA's starts from weights and from gradients beside torch PEFT's, on a tiny BERT: A, B and the base that is left."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_side
from tiers import slow

from jaxpeft import InputError, Lora, apply, load_model, match_targets
from jaxpeft.adapters.build import init_adapters, with_adjusted_base
from jaxpeft.calibration import kernel_gradients
from jaxpeft.quantization import dequantize, is_quantized, quantize
from jaxpeft.trees import leaf_paths, nest

TARGETS = ["query", "intermediate.dense", "output.dense"]  # square, wide and tall
NO_ADAPTERS = {"sites": {}, "modules": {}}
UNIT = {"r": 4, "lora_alpha": 4}
LORA = {"r": 4, "lora_alpha": 12}
PATTERNS = {"rank_pattern": {"query": 6}, "alpha_pattern": {r"1\.output\.dense": 5}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`(directory, our model)` of a BERT without dropout.

    64 wide: on a CPU, bitsandbytes 0.50.2 dequantises NF4 wrongly where an input axis is no multiple of the block
    (`dequantize_4bit` of a quantised 32 × 32 is off by more than a code).
    """
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    directory = torch_side.write_base(tmp_path_factory.mktemp("base"), "bert", **config)
    return directory, load_model(str(directory), "masked-lm")


@pytest.fixture
def loftq_on_a_cpu(monkeypatch):
    """PEFT runs LoftQ on an accelerator only; its arithmetic is the same on a CPU."""
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    namespace = dict(vars(loftq_utils))
    exec(source, namespace)
    monkeypatch.setattr(layer, "loftq_init", namespace["loftq_init"])


def peft_of(torch_model, **options):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rank-stabilised patterns, which it cannot convert
        return get_peft_model(torch_model, LoraConfig(**{"target_modules": TARGETS, **options})).eval()


def theirs(peft):
    """Layer → a, b, m and the kernel that is left, as ours have them."""
    from peft.tuners.lora.layer import LoraLayer

    found = {}
    for name, module in peft.named_modules():
        if isinstance(module, LoraLayer):
            site = {"a": module.lora_A, "b": module.lora_B, "m": module.lora_magnitude_vector}
            tensors = {key: group["default"].weight for key, group in site.items() if len(group)}
            tensors["kernel"] = module.get_base_layer().weight
            path = name.removeprefix("base_model.model.").replace(".", "/")
            found[path] = {key: tensor.detach().numpy().T for key, tensor in tensors.items()}
    return found


def ours(model, method, *, targets=TARGETS, statistics=None, params=None):
    sites = match_targets(model.sites(), targets)
    return init_adapters(params or model.params, method, sites, rng=jax.random.key(3), statistics=statistics)


def method_of(options):
    renamed = {"r": "rank", "lora_alpha": "alpha"}
    return Lora(**{renamed.get(key, key): value for key, value in options.items()})


def assert_same(frozen, adapters, method, expected, tolerance):
    """But for the signs of singular vectors, which are nobody's choice.

    A vector is known to rounding over the gap to the next singular value, here down to 0.02: ten times worse than products.
    """
    leaves = leaf_paths(frozen)
    assert adapters["sites"].keys() == expected.keys()
    for path, theirs in expected.items():
        site = {**adapters["sites"][path], "kernel": leaves[f"{path}/kernel"]}
        assert site.keys() == theirs.keys()
        for name in site:
            signless, times = (np.abs, 10) if name in "ab" else (np.asarray, 1)
            np.testing.assert_allclose(
                signless(site[name]), signless(theirs[name]), rtol=0, atol=times * tolerance, err_msg=path
            )
        np.testing.assert_allclose(site["a"] @ site["b"], theirs["a"] @ theirs["b"], rtol=0, atol=tolerance)


def loftq(bits, rounds):
    return {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": rounds}}


STARTS = {
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "pissa-rslora-patterns": {**LORA, "init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
    "pissa-dora": {**LORA, "init_lora_weights": "pissa", "use_dora": True},
    "olora": {**LORA, "init_lora_weights": "olora"},
    "olora-rslora": {**LORA, "init_lora_weights": "olora", "use_rslora": True},
    "olora-dora-patterns": {**LORA, "init_lora_weights": "olora", "use_dora": True, **PATTERNS},
    "loftq-4-bits": {**UNIT, **loftq(4, 1)},
    "loftq-4-bits-5-rounds": {**UNIT, **loftq(4, 5), "rank_pattern": {"query": 6}},
    "loftq-8-bits": {**UNIT, **loftq(8, 2)},
    "loftq-scaled-dora": {**LORA, **loftq(4, 2), "use_dora": True},
}


@pytest.mark.usefixtures("loftq_on_a_cpu")
@pytest.mark.parametrize("name", STARTS)
def test_a_start_from_weights_is_peft_s(name, base):
    directory, model = base
    options = STARTS[name]
    peft = peft_of(torch_side.load_torch(directory), **options)
    method = method_of(options)
    frozen, adapters = ours(model, method)
    assert_same(frozen, adapters, method, theirs(peft), 1e-5)

    inputs = torch_side.batch("bert")
    logits = apply(model.module, frozen, adapters, method, **model.inputs(inputs)).logits
    # As far as rounding takes it: 4 bits start at any of two codes where a value is midway, and none is here.
    np.testing.assert_allclose(logits, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-4)


SILENT = ["gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "lora_ga"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=slow, id="plain"),
        pytest.param({"use_rslora": True, "use_dora": True, **PATTERNS}, id="all"),
    ],
)
@pytest.mark.parametrize("start", SILENT)
def test_what_is_left_and_the_adapter_are_the_base(start, options, bert):
    model = bert
    method = Lora(4, 12.0, init_lora_weights=start, **options)
    statistics = gradients(model) if start == "lora_ga" else None
    frozen, adapters = ours(model, method, statistics=statistics)
    inputs = model.inputs(torch_side.batch("bert"))
    # In float64: what is compared is what the start left of the weights, and not how a processor rounds a whole model.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        module = model.module.clone(dtype=jnp.float64)
        base, left, silent = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (model.params, frozen, adapters))
        plain = apply(module, base, NO_ADAPTERS, **inputs).logits
        np.testing.assert_allclose(apply(module, left, silent, method, **inputs).logits, plain, rtol=0, atol=1e-5)
    changed = [p for p, leaf in leaf_paths(frozen).items() if not np.array_equal(leaf, leaf_paths(model.params)[p])]
    assert set(changed) == ({f"{path}/kernel" for path in adapters["sites"]} if method.modifies_base else set())
    assert all(np.abs(site["a"]).max() > 1e-3 for site in adapters["sites"].values())


def masked_lm_loss(model):
    """The mean cross-entropy of all tokens."""
    import optax

    def loss(params, batch):
        logits = apply(model.module, params, NO_ADAPTERS, **model.inputs(dict(batch))).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    return loss


def batches():
    first = torch_side.batch("bert")
    pairs = [first, {**first, "input_ids": np.roll(first["input_ids"], 1, axis=0)}]
    return [{**batch, "labels": np.roll(batch["input_ids"], i + 1, axis=1)} for i, batch in enumerate(pairs)]


def gradients(model):
    return kernel_gradients(masked_lm_loss(model), model.params, match_targets(model.sites(), TARGETS), batches())


SCALES = [("ArB2r", scale) for scale in ("stable", "weight_svd", "gd_scale", "unit")]


@pytest.mark.parametrize(
    ("direction", "scale"),
    [
        *(pytest.param(*case, marks=slow) for case in SCALES[1:]),
        SCALES[0],
        pytest.param("ArBr", "stable", marks=slow),
        ("A2rBr", "unit"),
    ],
)
def test_lora_ga_is_peft_s(direction, scale, base):
    """With rank 16 of 64, PEFT's randomised SVD takes all directions and is exact.

    A and B hold different singular vectors here, whose signs are independent: theirs are given to ours first.
    """
    import torch
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    directory, model = base
    values = {"direction": direction, "scale": scale, "stable_gamma": 9}
    options = {"init_lora_weights": "lora_ga", "target_modules": TARGETS}
    config = LoraConfig(r=16, lora_alpha=12, lora_ga_config=LoraGAConfig(**values), **options)
    torch_model = torch_side.load_torch(directory)

    def train_step():
        for batch in batches():
            tensors = {key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()}
            torch_model(**tensors).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hook that counts, where nothing below a layer wants a gradient
        preprocess_loraga(torch_model, config, train_step)
    measured = gradients(model)
    for name, module in torch_model.named_modules():
        if hasattr(module, "_peft_loraga_grad"):
            np.testing.assert_allclose(
                measured.pop(name.replace(".", "/")), module._peft_loraga_grad.numpy().T, atol=1e-6
            )
    assert not measured

    method = Lora(16, 12.0, init_lora_weights="lora_ga", lora_ga_config=values)
    frozen, adapters = ours(model, method, statistics=gradients(model))
    expected = theirs(get_peft_model(torch_model, config))
    for path, site in adapters["sites"].items():
        kernel = leaf_paths(model.params)[f"{path}/kernel"]
        np.testing.assert_allclose(
            leaf_paths(frozen)[f"{path}/kernel"] + method.scaling * (site["a"] @ site["b"]), kernel, rtol=0, atol=1e-5
        )
        site["a"] = site["a"] * np.sign((site["a"] * expected[path]["a"]).sum(0))
        site["b"] = site["b"] * np.sign((site["b"] * expected[path]["b"]).sum(1))[:, None]
        # PEFT's largest singular value of W is that of a randomised SVD of 16 directions.
        tolerance = 1e-2 if scale == "weight_svd" else 1e-3
        np.testing.assert_allclose(site["a"], expected[path]["a"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(site["b"], expected[path]["b"], rtol=0, atol=tolerance * np.abs(site["b"]).max())
        left = method.adjust_base(kernel, site)
        change = np.abs(kernel - left).max()
        np.testing.assert_allclose(left, expected[path]["kernel"], rtol=0, atol=tolerance * change)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "olora", "lora_ga", "eva"])
def test_an_embedding_starts_as_in_peft(start, base):
    """At A = 0, with its table as it was, whatever the name."""
    from peft.tuners.lora.layer import Embedding

    directory, model = base
    method = Lora(4, 12.0, init_lora_weights=start)
    frozen, adapters = ours(model, method, targets=["word_embeddings"])
    (path,) = adapters["sites"]
    site = adapters["sites"][path]
    assert not site["a"].any()
    assert 0.8 < np.std(site["b"]) < 1.2
    np.testing.assert_array_equal(
        leaf_paths(frozen)[f"{path}/embedding"], leaf_paths(model.params)[f"{path}/embedding"]
    )

    torch_model = torch_side.load_torch(directory)
    before = torch_model.bert.embeddings.word_embeddings.weight.detach().clone().numpy()
    peft = peft_of(torch_model, **LORA, target_modules=["word_embeddings"], init_lora_weights=start)
    (module,) = (module for module in peft.modules() if isinstance(module, Embedding))
    assert not module.lora_embedding_A["default"].any()
    np.testing.assert_array_equal(module.get_base_layer().weight.detach(), before)


def quantized(model):
    leaves = leaf_paths(model.params)
    layers = match_targets(model.sites(), TARGETS)
    return nest(
        {
            p: quantize(leaf) if p.rpartition("/")[0] in layers and p.endswith("kernel") else leaf
            for p, leaf in leaves.items()
        }
    )


def test_olora_quantises_what_it_leaves_of_a_quantised_kernel(bert):
    params, method = quantized(bert), Lora(4, 12.0, init_lora_weights="olora")
    frozen, adapters = ours(bert, method, params=params)
    for path, site in adapters["sites"].items():
        before, after = leaf_paths(params)[f"{path}/kernel"], leaf_paths(frozen)[f"{path}/kernel"]
        left = dequantize(before) - method.scaling * (site["a"] @ site["b"])
        assert is_quantized(after)
        np.testing.assert_array_equal(dequantize(after), dequantize(quantize(left)))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "loftq", "lora_ga"])
def test_the_others_want_a_base_in_full_precision(start, bert):
    model, method = bert, Lora(4, 12.0, init_lora_weights=start)
    with pytest.raises(InputError, match=r"layer bert/.* is stored quantised.*do not quantise the base") as caught:
        ours(model, method, params=quantized(model), statistics=gradients(model))
    assert "\n" not in str(caught.value)
    if start == "lora_ga":
        with pytest.raises(InputError, match="LoRA-GA needs its gradient"):
            kernel_gradients(lambda *_: 0, quantized(model), match_targets(model.sites(), TARGETS), batches())


def test_a_load_changes_the_base_without_chance(bert):
    """ "pissa_niter_4" like PiSSA itself; LoRA-GA not at all, and says so."""
    model = bert
    targets = match_targets(model.sites(), TARGETS)

    def loaded(start):
        return with_adjusted_base(model.params, Lora(4, 12.0, init_lora_weights=start), targets)

    exact, _ = ours(model, Lora(4, 12.0, init_lora_weights="pissa"))
    for start in ("pissa", "pissa_niter_4"):
        jax.tree.map(np.testing.assert_array_equal, loaded(start), exact)
    with pytest.warns(UserWarning, match="LoRA-GA changed the base.*export the difference"):
        assert loaded("lora_ga") is model.params
    for start in ("eva", "orthogonal", "gaussian", True):
        assert loaded(start) is model.params
