"""A run's training and evaluation steps with shapes for arguments: the functions that `runs.train.run` calls, ready to lower.

No weight is loaded and nothing of the model is computed. How long a run is, and where its adapters start, change no program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.config import RunConfig
from jaxpeft.data import ClassificationData, MaskedLMData, PackedData, Splits
from jaxpeft.data.classification import cap_buckets
from jaxpeft.data.masked_lm import num_masked
from jaxpeft.errors import InputError
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model, load_tokenizer
from jaxpeft.models.sources import resolve
from jaxpeft.runs.prepare import (
    Adapted,
    TrainingData,
    prepare_adapters,
    prepare_model_shapes,
    prepare_optimizer,
    prepare_splits,
    prepare_state,
    prepare_training_data,
)
from jaxpeft.runs.schedule import make_plan
from jaxpeft.training.input_pipeline import fits, in_program
from jaxpeft.training.loop import Plan
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import TrainState, make_eval_step, make_train_step, make_train_steps
from jaxpeft.trees import size_bytes

_MANY_PASSES = 1_000_000  # an epoch's, so that warm-up and pruning fit where the data that says how many is not read


@dataclass(frozen=True)
class AbstractRun:
    """What a run's steps are made of, and the shapes of what they are given, on the devices of `parallel`.

    `num_labels` is None for masked-lm. `training_data` are the training rows in batches of so many texts; for masked-lm they are not
    read, and stand-ins as many as a batch has.
    """

    config: RunConfig
    parallel: DataParallel
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    plan: Plan
    frozen: Any
    state: TrainState
    num_labels: int | None
    training_data: Callable[[int], TrainingData]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens a row of the batches that training may see, ascending; each is a program of its own."""
        data = self.config.data
        if self.config.task == "masked-lm":
            return (data.max_length,)
        return cap_buckets(data.bucket_lengths, data.max_length)

    def training_shape(self, batch_size: int, length: int) -> tuple[int, int]:
        """(rows, tokens a row) of a training batch of `batch_size` texts whose bucket has `length` tokens: with packing both differ."""
        data = self.training_data(batch_size)
        return (data.layout.num_rows, data.layout.length) if isinstance(data, PackedData) else (batch_size, length)

    @property
    def num_texts(self) -> int | None:
        """Training texts, where a batch of more needs no more than they do; else None."""
        data = self.training_data(self.config.training.batch_size)
        return len(data.unpacked.labels) if isinstance(data, PackedData) else None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all that trains, in fp32: what data parallelism must add up over the chips."""
        return size_bytes(self.state.adapters)


def abstract_run(config: RunConfig, parallel: DataParallel) -> AbstractRun:
    """The steps of the run that `config` describes, on the devices of `parallel`.

    For classification the data is read, because the number of labels is in it, and of tokens, and with `data.packing` that of rows.

    Raises:
        InputError: as `runs.train.run` does for its configuration, its model's files and its data.
    """
    splits = prepare_splits(config) if config.task == "classification" else None
    num_labels = splits.num_labels if splits else None
    model = prepare_model_shapes(config, num_labels)
    flash = choose_flash(config.model.attention, model, parallel.device, parallel.over_devices)
    adapted = _adapted(config, model)
    plan = make_plan(config, _MANY_PASSES, "loss", method=adapted.method)
    optimizer = prepare_optimizer(config, model, plan.learning_rate)
    state = jax.eval_shape(
        lambda adapters: prepare_state(config, plan, optimizer, adapters, parallel), adapted.adapters
    )
    objective = Objective(model, adapted.method, num_labels or 0, flash)
    data = _texts(config, splits, model, parallel.mesh.size) if splits else _dummy_data(config, model)
    return AbstractRun(config, parallel, objective, optimizer, plan, adapted.frozen, state, num_labels, data)


def _texts(config: RunConfig, splits: Splits, model: Model, num_devices: int) -> Callable[[int], TrainingData]:
    """With packing it depends on the texts' lengths, and on how many devices share them, how many rows hold a batch."""
    data = prepare_training_data(config, splits.train, model, _tokenizer(config, model), num_devices)

    def of(batch_size: int) -> TrainingData:
        if isinstance(data, PackedData):
            return replace(data, unpacked=replace(data.unpacked, batch_size=batch_size))
        return replace(data, batch_size=batch_size)

    return of


def _dummy_data(config: RunConfig, model: Model) -> Callable[[int], TrainingData]:
    """Rows of masked-lm as far as their shapes go: the program is the same for any number of them."""

    def of(batch_size: int) -> TrainingData:
        shape, vocab_size = (batch_size, config.data.max_length), model.config.vocab_size
        ids = {"mask_token_id": 0, "pad_token_id": 0, "vocab_size": vocab_size, "special_ids": (0,)}
        blocks, can_mask = np.zeros(shape, np.int32), np.ones(shape, bool)
        return MaskedLMData(blocks, can_mask, batch_size, config.data.mask_ratio, seed=config.seed, **ids)

    return of


def _tokenizer(config: RunConfig, model: Model) -> Any:
    name = config.model.tokenizer
    return load_tokenizer(resolve(name).directory if name else model.source.directory)


def _adapted(config: RunConfig, model: Model) -> Adapted:
    """The run's adapters as shapes. A start from data or weights has the shapes of LoRA's own: it is not computed."""
    a = config.adapter
    if a.init_lora_weights == "eva":
        raise InputError(
            "adapter.init_lora_weights 'eva' chooses ranks by the training data, and preflight computes nothing; "
            "set it to null, with adapter.eva_config: the cost is about the same"
        )
    plain = replace(a, init_lora_weights=None, loftq_config=None, eva_config=None, lora_ga_config=None)
    config = replace(config, adapter=plain)
    tokenizer = _tokenizer(config, model) if a.prompt_tuning_init == "TEXT" else None
    found = []

    def trees(params: Any) -> Any:
        found.append(prepare_adapters(config, replace(model, params=params), tokenizer))
        return found[-1].frozen, found[-1].adapters

    frozen, adapters = jax.eval_shape(trees, model.params)
    return replace(found[-1], frozen=frozen, adapters=adapters)


def batch_shapes(run: AbstractRun, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as `jaxpeft.data` makes them without packing, of `batch_size` rows of `length` tokens."""
    ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    if run.config.task == "masked-lm":
        places = (batch_size, num_masked(length, run.config.data.mask_ratio))
        labels = jax.ShapeDtypeStruct(places, jnp.int32)
        special = {"positions": labels, "labels": labels, "weights": jax.ShapeDtypeStruct(places, jnp.float32)}
    else:
        dtype = jnp.float32 if run.num_labels == 1 else jnp.int32
        labels = jax.ShapeDtypeStruct((batch_size,), dtype)
        special = {"token_type_ids": ids, "labels": labels, "weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}
    return {"input_ids": ids, "attention_mask": ids, **special}


def lower_training(run: AbstractRun, batch_size: int, length: int) -> jax.stages.Lowered:
    """The program of the training loop, lowered: ready to compile. Batches of `length` tokens are assembled in it, or sent to it whole.

    It turns as often as it is told, so that the compiler counts FLOPs and bytes of one pass.
    """
    norm, passes = run.config.training.max_grad_norm, run.plan.passes_per_dispatch
    step = make_train_step(run.objective, run.optimizer, allocation=run.plan.allocation, max_grad_norm=norm)
    data = run.training_data(batch_size)
    device_data, draw = dict(data.device_data), data.draw(0)
    if isinstance(data, ClassificationData):
        draw = {**draw, "columns": np.arange(length, dtype=np.int32)}
    if fits(device_data):
        program: Any = make_train_steps(step, in_program(data, run.parallel))
        draws = run.parallel.replicated_shapes(_stacked(draw, passes))
    else:
        program = make_train_steps(step, lambda device_data, batch: batch)
        draws = run.parallel.split_shapes(_stacked(data.assemble(device_data, draw, np), passes), axis=1)
        device_data = {}
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state, frozen, kept, count = run.parallel.replicated_shapes((run.state, run.frozen, device_data, count))
    return program.lower(state, frozen, kept, draws, count)


def _stacked(arrays: Mapping[str, np.ndarray], number: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((number, *array.shape), array.dtype) for name, array in arrays.items()}


def lower_evaluation(run: AbstractRun, batch_size: int, length: int) -> jax.stages.Lowered:
    """The evaluation step, likewise."""
    step: Any = make_eval_step(run.objective)
    frozen, adapters, masks = run.parallel.replicated_shapes((run.frozen, run.state.adapters, run.state.masks))
    return step.lower(frozen, adapters, masks, run.parallel.split_shapes(batch_shapes(run, batch_size, length)))
