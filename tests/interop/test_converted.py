"""Files of adapters whose start changed the base: converted to a LoRA for the base as it was, and unconverted, as PEFT writes them."""

import copy
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from tiers import slow, slow_but

from jaxpeft import BaseInfo, InputError, Lora, apply, load_adapter, match_targets, save_adapter
from jaxpeft.adapters.build import init_adapters
from jaxpeft.calibration import kernel_gradients
from jaxpeft.interop.peft.converted import without_start

TARGETS = ["query", "output.dense"]
PATTERNS = {"rank_pattern": {"query": 2}, "alpha_pattern": {r"1\.output\.dense": 5.0}}
NO_ADAPTERS = {"sites": {}, "modules": {}}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": PATTERNS,
    "all": {"use_rslora": True, "use_dora": True, **PATTERNS},  # which PEFT itself does not convert
}


def logits_of(model, frozen, adapters, method):
    return apply(model.module, frozen, adapters, method, **model.inputs(torch_side.batch("bert"))).logits


def logits_in_float64(model, frozen, adapters, method):
    """What is compared is what was read of a file, and not how a processor rounds a whole model."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model, frozen, adapters = tiny.doubled(model, frozen, adapters)
        return np.asarray(logits_of(model, frozen, adapters, method))


def gradients(model, targets):
    def loss(params, batch):
        return jnp.square(logits_of(model, params, NO_ADAPTERS, None)).mean()

    return kernel_gradients(loss, model.params, targets, [{}])


def trained(model, method):
    """`(frozen, start, adapters)`: every parameter moved a little from where it started."""
    targets = match_targets(model.sites(), [*TARGETS, *(["word_embeddings"] if not method.use_dora else [])])
    statistics = gradients(model, targets) if method.needs_statistics else None
    frozen, start = init_adapters(model.params, method, targets, rng=jax.random.key(5), statistics=statistics)
    sites = {
        path: {
            name: leaf + jnp.asarray(tiny.normal(10 * i + j, *leaf.shape, scale=0.05))
            for j, (name, leaf) in enumerate(site.items())
        }
        for i, (path, site) in enumerate(start["sites"].items())
    }
    return frozen, start, {**start, "sites": sites}


@pytest.mark.parametrize("name", slow_but(OPTIONS, "plain", "all"))
@pytest.mark.parametrize("start", ["pissa", pytest.param("pissa_niter_2", marks=slow), "olora", "lora_ga"])
def test_the_converted_file_is_a_lora_for_the_unchanged_base(start, name, bases, tmp_path):
    options = OPTIONS[name]
    base, model = bases("bert", "masked-lm")
    method = Lora(4, 6.0, init_lora_weights=start, **options)
    frozen, begun, adapters = trained(model, method)
    ours = logits_of(model, frozen, adapters, method)
    assert np.abs(ours - logits_of(model, model.params, NO_ADAPTERS, None)).max() > 0.01

    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model), start=begun)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path)
    np.testing.assert_allclose(torch_side.torch_logits(peft, torch_side.batch("bert")), ours, rtol=0, atol=1e-5)
    config = torch_side.config_of(tmp_path)
    growth = 2**0.5 if method.use_rslora else 2
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, growth * 6, True)
    assert config["rank_pattern"] == {name: 2 * rank for name, rank in method.rank_pattern.items()}

    unchanged, read, plain = load_adapter(tmp_path, model.params)
    jax.tree.map(np.testing.assert_array_equal, unchanged, model.params)
    assert plain.at("bert/encoder/layer/0/attention/self/query").scaling == pytest.approx(
        method.at("bert/encoder/layer/0/attention/self/query").scaling
    )
    np.testing.assert_allclose(logits_of(model, unchanged, read, plain), ours, rtol=0, atol=1e-5)


def peft_trained(directory, options, path, *, converted, model=None):
    """An adapter of torch PEFT, moved a little and saved; its logits, computed in float64."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "eva" has not seen data yet
        peft = get_peft_model(
            model or torch_side.load_torch(directory), LoraConfig(r=4, lora_alpha=12, **options)
        ).eval()
    fresh = str(path / "fresh")
    peft.peft_config["default"].init_lora_weights = True  # else PEFT would change the base again when it reads this
    peft.save_pretrained(fresh)
    peft.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad and "lora" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    how = {"path_initial_model_for_weight_conversion": fresh} if converted else {}
    logits = torch_side.torch_logits(copy.deepcopy(peft).double(), torch_side.batch("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a second adapter comes, to be taken off the first
        peft.save_pretrained(path / "file", **how)
    return logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_peft_s_converted_files_load(start, rslora, bases, tmp_path):
    base, model = bases("bert", "masked-lm")
    options = {"target_modules": TARGETS, "init_lora_weights": start, "use_rslora": rslora}
    theirs = peft_trained(base, options, tmp_path, converted=True)
    frozen, adapters, method = load_adapter(tmp_path / "file", model.params)
    assert method.rank == 8
    assert not method.modifies_base
    np.testing.assert_allclose(logits_in_float64(model, frozen, adapters, method), theirs, rtol=0, atol=1e-5)


@pytest.fixture
def svd_in_float64(monkeypatch):
    """Both sides decompose the base in double precision: in single, singular vectors of near values depend on the processor."""
    import torch

    def exactly(svd, single, double):
        def run(matrix, *args, **kwargs):
            return tuple(single(part) for part in svd(double(matrix), *args, **kwargs))

        return run

    numpy_svd = exactly(np.linalg.svd, lambda part: part.astype(np.float32), lambda matrix: matrix.astype(np.float64))
    monkeypatch.setattr(np.linalg, "svd", numpy_svd)
    monkeypatch.setattr(torch.linalg, "svd", exactly(torch.linalg.svd, torch.Tensor.float, torch.Tensor.double))


UNCONVERTED = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora-rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "olora-embeddings": {"init_lora_weights": "olora", "target_modules": [*TARGETS, "word_embeddings"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "whiten": True}},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", UNCONVERTED)
@pytest.mark.usefixtures("svd_in_float64")
def test_unconverted_files_load_and_keep_their_bytes(name, bases, tmp_path):
    """The base is changed at every load, as in PEFT; written again without a start, the file is the same."""
    base, model = bases("bert", "masked-lm")
    options = {"target_modules": TARGETS, **UNCONVERTED[name]}
    theirs = peft_trained(base, options, tmp_path, converted=False)
    frozen, adapters, method = load_adapter(tmp_path / "file", model.params)
    np.testing.assert_allclose(logits_in_float64(model, frozen, adapters, method), theirs, rtol=0, atol=1e-5)
    assert method.init_lora_weights == options["init_lora_weights"]

    save_adapter(tmp_path / "again", adapters, method, base=BaseInfo.of(model))
    before, after = torch_side.tensors_of(tmp_path / "file"), torch_side.tensors_of(tmp_path / "again")
    assert {k: v.tobytes() for k, v in after.items()} == {
        k: v.tobytes() for k, v in before.items() if k in after or "embedding" not in k
    }
    configs = [torch_side.config_of(tmp_path / where) for where in ("file", "again")]
    for key in ("init_lora_weights", "loftq_config", "eva_config", "lora_ga_config", "use_dora", "use_rslora", "r"):
        assert configs[0][key] == configs[1][key], key
    assert load_adapter(tmp_path / "again", model.params)[2] == method


def test_loftq_s_file_makes_the_quantised_base_again(bases, tmp_path):
    """PEFT loads it on an accelerator only; the arithmetic is compared in test_initialization.py."""
    _, model = bases("bert", "masked-lm")
    method = Lora(4, 4.0, init_lora_weights="loftq", loftq_config={"loftq_iter": 3}, rank_pattern={"query": 6})
    targets = match_targets(model.sites(), TARGETS)
    frozen, adapters = init_adapters(model.params, method, targets, rng=jax.random.key(5))
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model))
    config = torch_side.config_of(tmp_path)
    assert (config["init_lora_weights"], config["loftq_config"]) == ("loftq", {"loftq_bits": 4, "loftq_iter": 3})
    read, again, _ = load_adapter(tmp_path, model.params)
    jax.tree.map(np.testing.assert_array_equal, read, frozen)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_lora_ga_s_unconverted_file_is_for_the_changed_base(bases, tmp_path):
    """As in PEFT: no load changes the base, which must have been saved after its change."""
    from peft import LoraGAConfig

    base, model = bases("bert", "masked-lm")
    torch_model = torch_side.load_torch(base)
    import torch

    for name, module in torch_model.named_modules():  # stands in for preprocess_loraga
        if name.endswith(tuple(TARGETS)):
            shape = module.weight.shape
            module._peft_loraga_grad = torch.tensor(tiny.normal(len(name), *shape, scale=0.05))
    options = {
        "target_modules": TARGETS,
        "init_lora_weights": "lora_ga",
        "lora_ga_config": LoraGAConfig(direction="ArBr", scale="unit"),
    }
    theirs = peft_trained(base, options, tmp_path, converted=False, model=torch_model)
    changed = jax.tree.map(jnp.array, model.params)
    for name, module in torch_model.named_modules():
        if name.endswith(tuple(f"{target}.base_layer" for target in TARGETS)):
            *layers, _ = name.split(".")
            at = changed
            for key in layers:
                at = at[key]
            at["kernel"] = jnp.asarray(module.weight.detach().numpy().T)
    with pytest.warns(UserWarning, match="LoRA-GA changed the base"):
        frozen, adapters, method = load_adapter(tmp_path / "file", changed)
    np.testing.assert_allclose(logits_in_float64(model, frozen, adapters, method), theirs, rtol=0, atol=1e-5)
    assert method.lora_ga_config == {"direction": "ArBr", "scale": "unit", "stable_gamma": 16}
    with pytest.raises(
        InputError, match="'lora_ga' changed the base in a way that no load can repeat; give the initial adapter"
    ):
        save_adapter(tmp_path / "again", adapters, method, base=BaseInfo.of(model))


def test_a_drawn_pissa_is_loaded_as_the_exact_one(bases, tmp_path):
    """PEFT draws again; here the base loses what that draw approximates."""
    base, model = bases("bert", "masked-lm")
    peft_trained(base, {"target_modules": TARGETS, "init_lora_weights": "pissa_niter_16"}, tmp_path, converted=False)
    frozen, _, method = load_adapter(tmp_path / "file", model.params)
    exact = Lora(4, 12.0, init_lora_weights="pissa")
    expected, _ = init_adapters(model.params, exact, match_targets(model.sites(), TARGETS), rng=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, frozen, expected)
    assert method.init_lora_weights == "pissa_niter_16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' is not supported; known: true, false"),
        ({"init_lora_weights": "mica"}, "'mica' is not supported"),
        ({"init_lora_weights": "eva", "eva_config": {"rhö": 2}}, "eva_config has no option 'rhö'"),
        ({"loftq_config": {"loftq_bits": 3}, "init_lora_weights": "loftq"}, "loftq_bits must be 4 or 8; got 3"),
    ],
)
def test_files_of_other_starts_are_refused(changes, message, bases, tmp_path):
    base, model = bases("bert", "masked-lm")
    peft_trained(base, {"target_modules": ["query"], "init_lora_weights": "gaussian"}, tmp_path, converted=False)
    file = tmp_path / "file" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path / "file", model.params)
    shutil.rmtree(tmp_path / "file")


def test_the_difference_by_hand():
    """A·B = 2·3, A₀·B₀ = 1·4, s = 2: W₀ gets 2·(6 − 4) = 4 from a LoRA of rank 2 and the same s."""
    site = {"a": jnp.array([[2.0]]), "b": jnp.array([[3.0]])}
    fresh = {"a": jnp.array([[1.0]]), "b": jnp.array([[4.0]])}
    for rslora, alpha in ((False, 4.0), (True, 2 * 2**0.5)):
        method = Lora(1, 2.0, init_lora_weights="pissa", use_rslora=rslora)
        plain, converted = without_start(method, {"layer": site}, {"layer": fresh})
        assert (plain.rank, plain.alpha, plain.init_lora_weights) == (2, pytest.approx(alpha), True)
        np.testing.assert_allclose(plain.kernel(jnp.zeros((1, 1)), converted["layer"]), [[4.0]], rtol=1e-6)
