"""A run's training and evaluation steps with abstract arguments: the functions that `runs.train.run` calls, ready to lower.

No weights are loaded, and the model is not run. The length of a run and the initialisation of its adapters do not change
the programs.
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

# Micro-steps per epoch. The real number is in the data, which may not be read; warm-up and pruning must fit in any case.
_MANY_PASSES = 1_000_000


@dataclass(frozen=True)
class AbstractRun:
    """The parts of a run's steps and the shapes of their arguments, on the devices of `parallel`.

    `num_labels` is None for masked-lm. `training_data` maps a batch size in texts to the training rows. For masked-lm it
    gives dummy rows for one batch, and the data is not read.
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
        """Possible tokens per row of training batches, ascending. Each length is a program of its own."""
        data = self.config.data
        if self.config.task == "masked-lm":
            return (data.max_length,)
        return cap_buckets(data.bucket_lengths, data.max_length)

    def training_shape(self, batch_size: int, length: int) -> tuple[int, int]:
        """(rows, tokens per row) of a training batch: `batch_size` and the bucket's `length`, unless texts are packed."""
        data = self.training_data(batch_size)
        return (data.layout.num_rows, data.layout.length) if isinstance(data, PackedData) else (batch_size, length)

    @property
    def num_texts(self) -> int | None:
        """Number of training texts if texts are packed: a batch of more texts needs no more memory. Else None."""
        data = self.training_data(self.config.training.batch_size)
        return len(data.unpacked.labels) if isinstance(data, PackedData) else None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trained parameters in fp32, which data parallelism sums over the chips."""
        return size_bytes(self.state.adapters)


def abstract_run(config: RunConfig, parallel: DataParallel) -> AbstractRun:
    """The steps of the run that `config` describes, on the devices of `parallel`.

    For classification the data is read, because it decides the number of labels and of tokens, and with `data.packing`
    the number of rows.

    Raises:
        InputError: as `runs.train.run` for the configuration, the model's files and the data.
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
    data = _real_data(config, splits, model, parallel.mesh.size) if splits else _dummy_data(config, model)
    return AbstractRun(config, parallel, objective, optimizer, plan, adapted.frozen, state, num_labels, data)


def _real_data(config: RunConfig, splits: Splits, model: Model, num_devices: int) -> Callable[[int], TrainingData]:
    """The training data by batch size. It is read because packed rows per batch depend on the texts' lengths and the devices."""
    data = prepare_training_data(config, splits.train, model, _tokenizer(config, model), num_devices)

    def of(batch_size: int) -> TrainingData:
        if isinstance(data, PackedData):
            return replace(data, unpacked=replace(data.unpacked, batch_size=batch_size))
        return replace(data, batch_size=batch_size)

    return of


def _dummy_data(config: RunConfig, model: Model) -> Callable[[int], TrainingData]:
    """Dummy masked-lm rows by batch size. The program does not depend on their number or values."""

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
    """The run's adapters as shapes. Initialisations from data or weights are skipped, since they do not change the shapes."""
    a = config.adapter
    if a.init_lora_weights == "eva":
        raise InputError(
            "adapter.init_lora_weights 'eva' chooses ranks from the training data, which preflight does not do; "
            "set it and adapter.eva_config to null: the cost is about the same"
        )
    plain = replace(a, init_lora_weights=None, loftq_config=None, eva_config=None, lora_ga_config=None)
    config = replace(config, adapter=plain)
    tokenizer = _tokenizer(config, model) if a.prompt_tuning_init == "TEXT" else None
    found = []  # eval_shape returns only arrays, so the rest of `Adapted` comes out through this list

    def trees(params: Any) -> Any:
        found.append(prepare_adapters(config, replace(model, params=params), tokenizer))
        return found[-1].frozen, found[-1].adapters

    frozen, adapters = jax.eval_shape(trees, model.params)
    return replace(found[-1], frozen=frozen, adapters=adapters)


def batch_shapes(run: AbstractRun, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of an unpacked batch of `jaxpeft.data`: `batch_size` rows of `length` tokens."""
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
    """Lower the program of the training loop for batches of `length` tokens, assembled inside it or sent to it whole.

    The number of iterations is an argument, so the compiler counts the FLOPs and bytes of one micro-step.
    """
    norm, passes = run.config.training.max_grad_norm, run.plan.passes_per_dispatch
    step = make_train_step(run.objective, run.optimizer, allocation=run.plan.allocation, max_grad_norm=norm)
    data = run.training_data(batch_size)
    device_data, draw = dict(data.device_data), data.draw(0)
    if isinstance(data, ClassificationData):
        draw = {**draw, "columns": np.arange(length, dtype=np.int32)}  # the wanted bucket, not the first batch's
    # The same choice as in training: data that fits stays on the devices, and batches are assembled there.
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
    """Lower the evaluation step for batches of `batch_size` rows of `length` tokens."""
    step: Any = make_eval_step(run.objective)
    frozen, adapters, masks = run.parallel.replicated_shapes((run.frozen, run.state.adapters, run.state.masks))
    return step.lower(frozen, adapters, masks, run.parallel.split_shapes(batch_shapes(run, batch_size, length)))
