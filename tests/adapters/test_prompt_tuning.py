"""Prompt tuning: the room in front of every row, what stands in it, and masked-lm, which PEFT does not have."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from flax import linen as nn
from tiers import slow, slow_but

from jaxpeft import BaseInfo, load_adapter, load_model, save_adapter
from jaxpeft.adapters import PromptTuning, Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.config import AdapterConfig, DataConfig, RunConfig
from jaxpeft.data import Split
from jaxpeft.errors import InputError
from jaxpeft.families import family_of
from jaxpeft.inject import apply, discover_sites
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization
from jaxpeft.runs import base_model
from jaxpeft.runs.data import text_pipeline
from jaxpeft.targets import match_targets
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.training.objective import Objective
from jaxpeft.training.step import make_train_step

WORDS = Site("bert/embeddings/word_embeddings", tiny.VOCABULARY, 32, "embedding")
TABLE = jnp.asarray(tiny.normal(0, tiny.VOCABULARY, 32))
TARGETS = (family_of("bert").word_embeddings,)


def prompted(model, n=3, **options):
    method = PromptTuning(n)
    return (method, *tiny.adapted(model, method, target_modules=TARGETS, **options))


class Embedding(nn.Module):
    """The words of a row, in `dtype`."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids, deterministic=True):
        return nn.Embed(6, 2, dtype=self.dtype, name="word_embeddings")(ids)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_prompt_stands_where_room_was_made_and_nowhere_else(dtype):
    module, params = Embedding(dtype), {"word_embeddings": {"embedding": jnp.arange(12.0).reshape(6, 2)}}
    ids = jnp.array([[-1, -1, 3, 0], [-1, -1, 5, 5]])
    sites = match_targets(discover_sites(module, params, ids=ids), list(TARGETS))
    frozen, adapters = init_adapters(params, PromptTuning(2), sites, rng=jax.random.key(0))
    adapters["sites"]["word_embeddings"] = {"prompt": jnp.array([[20.0, 30.0], [21.0, 31.0]])}
    run = jax.jit(lambda ids: apply(module, frozen, adapters, PromptTuning(2), ids=ids))
    out = run(ids)
    assert out.dtype == dtype
    np.testing.assert_array_equal(
        out.astype(jnp.float32), [[[20, 21], [30, 31], [6, 7], [0, 1]], [[20, 21], [30, 31], [10, 11], [10, 11]]]
    )
    # Without room, with too little and with too much of it: the row is NaN, and the others are not.
    spoilt = jnp.array([[1, 2, 3, 0], [-1, 2, 3, 0], [-1, -1, -1, 0], [-1, -1, 1, 2]])
    np.testing.assert_array_equal(jnp.isnan(run(spoilt).astype(jnp.float32)).any((1, 2)), [True, True, True, False])
    with pytest.raises(
        InputError, match=r"rows of 2 tokens have no room for a prompt of 2; make it with Model\.inputs"
    ):
        run(ids[:, :2])


def test_a_model_that_was_given_no_room_answers_nan(bert):
    method, frozen, adapters = prompted(bert)
    run = jax.jit(lambda inputs: apply(bert.module, frozen, adapters, method, **inputs).logits)
    # Both of 16 tokens: one program.
    for inputs in (bert.inputs(tiny.batch()), bert.inputs(tiny.batch(length=14), virtual_tokens=2)):
        assert jnp.isnan(run(inputs)).all()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_room_is_made_as_transformers_sees_embeddings(tiny_models, model_type):
    model, batch = tiny_models(model_type), torch_side.batch(model_type)
    inputs = model.inputs(batch, virtual_tokens=3)
    plain = model.inputs(batch)
    assert inputs.keys() == plain.keys()
    assert (inputs["input_ids"][:, :3] == -1).all()
    assert (inputs["attention_mask"][:, :3] == 1).all()
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in plain:
            np.testing.assert_array_equal(inputs[name][:, 3:], plain[name])
            assert inputs[name].dtype == plain[name].dtype
    if model_type == "bert":
        assert (inputs["token_type_ids"][:, :3] == 0).all()
    if model_type != "distilbert":  # which counts for itself
        start = 2 if model_type == "roberta" else 0
        np.testing.assert_array_equal(inputs["position_ids"], np.tile(np.arange(15) + start, (4, 1)))


@pytest.mark.parametrize("model_type", slow_but(["bert", "distilbert", "roberta"], "bert"))
def test_masked_lm_is_torch_s_model_on_the_same_embeddings(tmp_path, model_type):
    """PEFT cannot (KeyError: None), but transformers takes embeddings: the prompt in front of the words'."""
    import torch
    from peft import PromptTuningConfig, get_peft_model

    base = torch_side.write_base(tmp_path / "base", model_type, layers=1)
    with pytest.raises(KeyError, match="None"):
        get_peft_model(torch_side.load_torch(base), PromptTuningConfig(num_virtual_tokens=3, token_dim=32))
    model, theirs = load_model(str(base), "masked-lm"), torch_side.load_torch(base)
    method, frozen, adapters = prompted(model)
    batch = torch_side.batch(model_type)
    ((prompt,),) = (site.values() for site in adapters["sites"].values())
    words = theirs.get_input_embeddings()(torch.tensor(batch["input_ids"], dtype=torch.long))
    rows = torch.tensor(np.array(prompt.T)).expand(len(words), -1, -1)
    options = {"inputs_embeds": torch.cat([rows, words], 1)}
    options["attention_mask"] = torch.tensor(np.pad(batch["attention_mask"], ((0, 0), (3, 0)), constant_values=1))
    if model_type == "bert":
        options["token_type_ids"] = torch.tensor(np.pad(batch["token_type_ids"], ((0, 0), (3, 0)))).long()
    with torch.no_grad():
        expected = theirs(**options).logits.numpy()[:, 3:]

    objective = Objective(model, method, tiny.task_of(model))
    np.testing.assert_allclose(objective.logits(frozen, adapters, {}, batch), expected, rtol=0, atol=1e-5)
    # Positions are a row's own, whatever stands in front of it.
    positions = np.array([[0, 5], [2, 3], [1, 7], [0, 6]], np.int32)
    chosen = objective.logits(frozen, adapters, {}, {**batch, "positions": positions})
    np.testing.assert_allclose(chosen, np.take_along_axis(expected, positions[..., None], 1), rtol=0, atol=1e-5)

    save_adapter(tmp_path / "ours", adapters, method, base=BaseInfo.of(model))
    tensors = torch_side.tensors_of(tmp_path / "ours")
    assert {key: tensor.shape for key, tensor in tensors.items()} == {"prompt_embeddings": (3, 32)}
    _, again, loaded = load_adapter(tmp_path / "ours", model.params)
    assert loaded == method
    chex.assert_trees_all_equal(again, adapters)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param("bert", {}, marks=slow, id="bert"),
        pytest.param("distilbert", {"quantization": Quantization()}, id="distilbert-nf4"),
        pytest.param("roberta", {"gradient_checkpointing": True}, marks=slow, id="roberta-remat"),
    ],
)
def test_training_changes_the_prompt_alone_and_learns(tiny_models, model_type, options):
    model, method = tiny_models(model_type, **options), PromptTuning(4)
    objective, optimizer, frozen, state = tiny.training(model, method, learning_rate=0.1, target_modules=TARGETS)
    (path,) = state.adapters["sites"]
    assert path == f"{model_type}/embeddings/word_embeddings"
    before, base = tiny.snapshot(state.adapters), tiny.snapshot(frozen)
    step, losses = make_train_step(objective, optimizer), []
    for _ in range(12):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(tiny.snapshot(frozen), base)
    after = tiny.snapshot(state.adapters)["sites"][path]["prompt"]
    assert (after != before["sites"][path]["prompt"]).all(0).all()


def test_it_cannot_be_merged(bert):
    method, frozen, adapters = prompted(bert)
    with pytest.raises(InputError, match=r"prompt tuning cannot be merged: it adds input tokens"):
        merge(frozen, adapters, method)


def init(method, site=WORDS):
    return method.init(jax.random.key(0), site, lambda: TABLE)["prompt"]


def test_it_starts_from_noise_as_peft_s():
    """N(0, 1), to 1 % of 2.5·10⁵ draws, whose variance is uncertain by 0.28 %."""
    import torch
    from peft import PromptEmbedding, PromptTuningConfig

    torch.manual_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=250, token_dim=1000, num_transformer_submodules=1)
    theirs = PromptEmbedding(config, torch.nn.Embedding(2, 1000)).embedding.weight.detach().numpy()
    ours = np.asarray(init(PromptTuning(250), Site("word_embeddings", 9, 1000, "embedding"))).T
    assert ours.shape == theirs.shape
    assert abs(ours.mean() - theirs.mean()) < 0.01
    assert ours.var() == pytest.approx(theirs.var(), rel=0.01)


def test_it_can_start_from_words():
    sampled = np.asarray(init(PromptTuning(5, "SAMPLE_VOCAB"))).T
    assert all((row == np.asarray(TABLE)).all(1).any() for row in sampled)
    assert len({row.tobytes() for row in sampled}) > 1
    # A text is repeated or cut to the prompt's length, as in PEFT.
    for n, expected in [(5, [7, 8, 7, 8, 7]), (1, [7])]:
        np.testing.assert_array_equal(init(PromptTuning(n, "TEXT", init_token_ids=(7, 8))).T, TABLE[np.array(expected)])
    assert {leaf.shape for leaf in (init(PromptTuning(5)), init(PromptTuning(5, "SAMPLE_VOCAB")))} == {(32, 5)}
    assert PromptTuning(5).shapes(WORDS) == {"prompt": (32, 5)}


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda: PromptTuning(0), r"adapter\.num_virtual_tokens is 0; it must be at least 1"),
        (lambda: PromptTuning(3, "ZEROS"), "unknown prompt_tuning_init 'ZEROS'"),
        (lambda: init(PromptTuning(3, "TEXT")), "prompt_tuning_init TEXT needs the text's token ids"),
        (
            lambda: init(PromptTuning(3, "TEXT", init_token_ids=[99])),
            r"token ids \[99\] reach outside the vocabulary of 99",
        ),
        (lambda: init(PromptTuning(3), Site("query", 32, 32)), "'query' is a linear layer"),
    ],
)
def test_prompts_that_cannot_be_are_refused(start, message):
    with pytest.raises(InputError, match=message):
        start()


def test_a_text_s_file_is_peft_s(bert, tmp_path):
    """PEFT refuses a TEXT config without the text or the tokenizer's name; with them it is read back as it was."""
    options = {"init_token_ids": (7, 8), "prompt_tuning_init_text": "very good", "tokenizer_kwargs": {"use_fast": True}}
    incomplete = PromptTuning(3, "TEXT", **options)
    _, adapters = tiny.adapted(bert, incomplete, target_modules=TARGETS)
    with pytest.raises(InputError, match="prompt_tuning_init_text and tokenizer_name_or_path"):
        save_adapter(tmp_path, adapters, incomplete, base=BaseInfo.of(bert))
    complete = PromptTuning(3, "TEXT", tokenizer_name_or_path="tokenizer", **options)
    save_adapter(tmp_path, adapters, complete, base=BaseInfo.of(bert))
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.prompt_tuning_init_text, config.tokenizer_name_or_path) == ("very good", "tokenizer")
    assert (config.token_dim, config.num_layers, config.num_attention_heads) == (32, 2, 2)
    loaded = load_adapter(tmp_path, bert.params)[2]
    assert loaded == PromptTuning(
        3, "TEXT", "very good", tokenizer_name_or_path="tokenizer", tokenizer_kwargs={"use_fast": True}
    )


def test_the_prompt_s_positions_are_not_the_text_s(bert, monkeypatch):
    """40 positions: a prompt of 3 leaves 37."""
    monkeypatch.setattr(base_model, "load_model", lambda *args, **options: bert)
    config = RunConfig(
        data=DataConfig(name="python-docs", max_length=38),
        adapter=AdapterConfig(method="prompt-tuning", num_virtual_tokens=3),
    )
    with pytest.raises(
        InputError,
        match=r"max_length 38 exceeds the 37 positions of .* besides adapter\.num_virtual_tokens 3; give at most 37",
    ):
        base_model.load_base(config.model, MaskedLM(), PromptTuning(3), config.adapter, max_length=38, seed=0)

    class Tokenizer:
        mask_token, mask_token_id = "[MASK]", 4

        def __call__(self, texts, **options):
            return {"input_ids": [[4] * 38 for _ in texts]}

    pipeline = text_pipeline(config.data, bert, Tokenizer(), method=PromptTuning(3))
    with pytest.raises(InputError, match="has 38 tokens; the model has 37 positions for a text: shorten it"):
        MaskedLM().make_questions(Split(["a [MASK]"]), pipeline, batch_size=1, top=1)
