"""A run's training and evaluation steps with shapes for arguments: the functions that `experiment.run` calls, ready to lower.

No weight is loaded and nothing of the model is computed. How long a run is, and where its adapters start, change no program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.config import RunConfig
from jaxpeft.data import Split
from jaxpeft.data.classification import cap_buckets
from jaxpeft.data.masked_lm import num_masked
from jaxpeft.errors import InputError
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model, load_tokenizer
from jaxpeft.models.sources import resolve
from jaxpeft.paths import size_bytes
from jaxpeft.plan import make_plan
from jaxpeft.prepare import (
    Adapted,
    prepare_adapters,
    prepare_model_shapes,
    prepare_optimizer,
    prepare_splits,
    prepare_state,
    prepare_training_data,
)
from jaxpeft.training.loop import Plan
from jaxpeft.training.objectives import Batch, Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import TrainState, make_eval_step, make_train_step, make_train_steps

_MANY_PASSES = 1_000_000  # an epoch's, so that warm-up and pruning fit where the data that says how many is not read


@dataclass(frozen=True)
class RunShapes:
    """What a run's steps are made of, and the shapes of what they are given, on the devices of `parallel`.

    `num_labels` is None for masked-lm. `packed_batch` makes a training batch of so many texts where rows hold several.
    """

    config: RunConfig
    parallel: DataParallel
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    plan: Plan
    frozen: Any
    state: TrainState
    num_labels: int | None
    packed_batch: Callable[[int], Batch] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens a row of the batches that training may see, ascending; each is a program of its own."""
        data = self.config.data
        if self.config.task == "masked-lm":
            return (data.max_length,)
        return cap_buckets(data.bucket_lengths, data.max_length)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all that trains, in fp32: what data parallelism must add up over the chips."""
        return size_bytes(self.state.adapters)


def run_shapes(config: RunConfig, parallel: DataParallel) -> RunShapes:
    """The steps of the run that `config` describes, on the devices of `parallel`.

    For classification the data is read, because the number of labels is in it, and with `data.packing` the number of rows.

    Raises:
        InputError: as `experiment.run` does for its configuration, its model's files and its data.
    """
    splits = prepare_splits(config) if config.task == "classification" else None
    num_labels = splits.num_labels if splits else None
    model = prepare_model_shapes(config, num_labels)
    flash = choose_flash(config.model.attention, model, parallel.device, parallel.over_devices)
    adapted = _adapted(config, model)
    plan = make_plan(config, _MANY_PASSES, "loss", method=adapted.method)
    optimizer = prepare_optimizer(config, model, plan)
    state = jax.eval_shape(
        lambda adapters: prepare_state(config, plan, optimizer, adapters, parallel), adapted.adapters
    )
    objective = Objective(model, adapted.method, num_labels or 0, flash)
    run = RunShapes(config, parallel, objective, optimizer, plan, adapted.frozen, state, num_labels)
    return replace(run, packed_batch=_packed(run, splits.train)) if splits and config.data.packing else run


def _packed(run: RunShapes, split: Split) -> Callable[[int], Batch]:
    """How many rows hold a batch of texts depends on their lengths, and on how many devices share them."""
    model, tokenizer = run.objective.model, _tokenizer(run.config, run.objective.model)

    def batch(batch_size: int) -> Batch:
        config = replace(run.config, training=replace(run.config.training, batch_size=batch_size))
        return prepare_training_data(config, split, model, tokenizer, run.parallel.mesh.size).train_batch(0)

    return batch


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


def batch_shapes(run: RunShapes, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch as `jaxpeft.data` makes them, of `batch_size` rows of `length` tokens."""
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


def lower_training(run: RunShapes, batch_size: int, length: int) -> jax.stages.Lowered:
    """The program of the training loop, lowered: ready to compile. Whole batches are sent to it.

    It turns as often as it is told, so that the compiler counts FLOPs and bytes of one pass.
    """
    norm, passes = run.config.training.max_grad_norm, run.plan.passes_per_dispatch
    step = make_train_step(run.objective, run.optimizer, allocation=run.plan.allocation, max_grad_norm=norm)
    program: Any = make_train_steps(step, lambda resident, batch: batch)
    batch = run.packed_batch(batch_size) if run.packed_batch else batch_shapes(run, batch_size, length)
    batches = {name: jax.ShapeDtypeStruct((passes, *leaf.shape), leaf.dtype) for name, leaf in batch.items()}
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state, frozen, count = run.parallel.replicated_shapes((run.state, run.frozen, count))
    return program.lower(state, frozen, {}, run.parallel.split_shapes(batches, axis=1), count)


def lower_evaluation(run: RunShapes, batch_size: int, length: int) -> jax.stages.Lowered:
    """The evaluation step, likewise."""
    step: Any = make_eval_step(run.objective)
    frozen, adapters, masks = run.parallel.replicated_shapes((run.frozen, run.state.adapters, run.state.masks))
    return step.lower(frozen, adapters, masks, run.parallel.split_shapes(batch_shapes(run, batch_size, length)))
