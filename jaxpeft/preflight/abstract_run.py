"""A run's training and evaluation steps with abstract arguments: the functions that `runs.train.run` calls, ready to lower.

No weights are loaded, and the model is not run. The length of a run and the initialisation of its adapters do not change
the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.adapters import Method
from jaxpeft.config import AdapterConfig, RunConfig
from jaxpeft.data import PackedData
from jaxpeft.errors import InputError
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model
from jaxpeft.runs.adapters import Adapted, build_method, prepare_adapters
from jaxpeft.runs.base_model import base_shapes, tokenizer_of
from jaxpeft.runs.contextual import contextual_sparsity, estimator_shapes_of
from jaxpeft.runs.data import load_data, row_options, text_pipeline, training_data
from jaxpeft.runs.schedule import make_plan
from jaxpeft.runs.setup import make_optimizer, state_of
from jaxpeft.tasks import task_for
from jaxpeft.tasks.base import Task
from jaxpeft.tasks.text_pipeline import RowOptions
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.input_pipeline import draw_of_length, fits, in_program
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.objective import Objective
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import TrainState, make_eval_step, make_train_step, make_train_steps
from jaxpeft.trees import ESTIMATORS, beside_model, size_bytes

# Batches per epoch. The real number is in the data, which may not be read; warm-up and pruning must fit in any case.
_MANY_BATCHES = 1_000_000


@dataclass(frozen=True)
class AbstractRun:
    """The parts of a run's steps and the shapes of their arguments, on the devices of `parallel`.

    Attributes:
        batch_sizes: texts per batch, of "training" and "evaluation".
        rows: the options that turn texts into rows.
        parallel: the devices.
        objective: the loss to minimise.
        optimizer: the optimizer of the adapters.
        max_grad_norm: global norm to which gradients are clipped; 0: no clipping.
        plan: the steps at which the run logs, validates and prunes.
        frozen: the base, as shapes.
        state: the training state, as shapes.
        training_data: maps a batch size in texts to the training rows. These are dummies if the shapes do not depend on the data.
        micro_batch_size: rows of a pass, or "auto".
    """

    batch_sizes: Mapping[str, int]
    rows: RowOptions
    parallel: DataParallel
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    max_grad_norm: float
    plan: Plan
    frozen: Any
    state: TrainState
    training_data: Callable[[int], Any]
    micro_batch_size: int | Literal["auto"] = "auto"

    @property
    def task(self) -> Task:
        """The task of the objective, which computes the loss."""
        return self.objective.task

    @property
    def lengths(self) -> tuple[int, ...]:
        """Possible tokens per row of training batches, ascending. Each length is a program of its own."""
        return self.task.lengths(self.rows)

    @property
    def is_packed(self) -> bool:
        """True if training rows hold several texts. Then they all have one length, so training has one program."""
        return isinstance(self.training_data(self.batch_sizes["training"]), PackedData)

    def training_shape(self, batch_size: int, length: int) -> tuple[int, int]:
        """(rows, tokens per row) of a training batch: `batch_size` and the bucket's `length`, unless rows have several texts."""
        data = self.training_data(batch_size)
        if isinstance(data, PackedData):
            return data.layout.num_rows, data.layout.length
        return batch_size * getattr(data, "texts_per_row", 1), length

    @property
    def num_texts(self) -> int | None:
        """Number of training texts if texts are packed: a batch of more texts needs no more memory. Else None."""
        data = self.training_data(self.batch_sizes["training"])
        return len(data.unpacked.labels) if isinstance(data, PackedData) else None

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of all trained parameters in fp32, which data parallelism sums over the chips."""
        return size_bytes(self.state.adapters)


def abstract_run(config: RunConfig, parallel: DataParallel) -> AbstractRun:
    """The steps of the run that `config` describes, on the devices of `parallel`.

    The data is read if the task's programs depend on it. It decides the number of labels and of tokens, and with
    `data.packing` the number of rows.

    Raises:
        InputError: as `runs.train.run` for the configuration, the model's files and the data.
    """
    rows, t = row_options(config.data), config.training
    method = build_method(config.adapter)
    task, data = task_for(config.task), None
    if task.dummy_data(rows, 1, vocab_size=1, seed=0) is None:
        task, splits = load_data(config.data, config.task, config.model, config.task_options)
        data = splits.train
    model = base_shapes(config.model, task, method, config.adapter, max_length=rows.max_length)
    flash = choose_flash(config.model.attention, model, parallel.device, parallel.over_devices)
    needs_tokenizer = data is not None or config.adapter.prompt_tuning_init == "TEXT"
    tokenizer = tokenizer_of(config.model, model) if needs_tokenizer else None
    adapted = _adapted(config.adapter, task, model, tokenizer, config.model.tokenizer)
    contextual = contextual_sparsity(config.contextual, model)
    estimators = estimator_shapes_of(contextual, model, rank=config.contextual.estimator_rank)
    plan = make_plan(
        t,
        config.pruning,
        batches_per_epoch=_MANY_BATCHES,
        metric="loss",
        method=adapted.method,
        distributed=config.distributed,
    )
    optimizer = make_optimizer(t, method, model, plan.learning_rate)
    rng = dropout_key(config.seed, platform=parallel.device.platform, num_devices=parallel.mesh.size)
    state = jax.eval_shape(
        lambda frozen, adapters, rng: state_of(
            plan, optimizer, replace(adapted, frozen=frozen, adapters=adapters), rng
        ),
        beside_model(adapted.frozen),
        adapted.adapters,
        rng,
    )

    def dummies(batch_size: int) -> Any:
        return task.dummy_data(rows, batch_size, vocab_size=model.config.vocab_size, seed=config.seed)

    return AbstractRun(
        batch_sizes={"training": t.batch_size, "evaluation": config.evaluation.batch_size},
        rows=rows,
        parallel=parallel,
        objective=Objective(model, adapted.method, task, flash, contextual, parallel.device.platform == "cpu"),
        optimizer=optimizer,
        max_grad_norm=t.max_grad_norm,
        plan=plan,
        frozen={**adapted.frozen, ESTIMATORS: estimators} if estimators else adapted.frozen,
        state=state,
        micro_batch_size=t.micro_batch_size,
        training_data=dummies
        if data is None
        else _of_any_batch_size(
            training_data(
                task,
                data,
                model,
                text_pipeline(config.data, model, tokenizer, method=method),
                packing=config.data.packing,
                batch_size=t.batch_size,
                seed=config.seed,
                num_devices=parallel.mesh.size,
            )
        ),
    )


def _of_any_batch_size(data: Any) -> Callable[[int], Any]:
    """The training data by batch size. With packing, the rows per batch depend on the texts' lengths and on the devices."""

    def of(batch_size: int) -> Any:
        if isinstance(data, PackedData):
            return replace(data, unpacked=replace(data.unpacked, batch_size=batch_size))
        return replace(data, batch_size=batch_size)

    return of


def _adapted(adapter: AdapterConfig, task: Task, model: Model, tokenizer: Any, tokenizer_name: str | None) -> Adapted:
    """The run's adapters as shapes. Initialisations from data or weights are skipped, since they do not change the shapes."""
    if adapter.init_lora_weights == "eva":
        raise InputError(
            "adapter.init_lora_weights 'eva' chooses ranks from the training data, which preflight does not do; "
            "set it and adapter.eva_config to null: the cost is about the same"
        )
    plain = replace(
        adapter,
        init_lora_weights=None,
        loftq_config=None,
        eva_config=None,
        lora_ga_config=None,
        mask_type=None if adapter.mask_type == "gradient" else adapter.mask_type,
        selection="weight" if adapter.selection in ("activation", "gradient") else adapter.selection,
    )
    method: Method | None = build_method(plain)
    found = []  # eval_shape returns only arrays, so the rest of `Adapted` comes out through this list

    def trees(params: Any) -> Any:
        with_params = replace(model, params=params)
        found.append(
            prepare_adapters(
                plain, method, task, with_params, seed=0, tokenizer=tokenizer, tokenizer_name=tokenizer_name
            )
        )
        return found[-1].frozen, found[-1].adapters

    frozen, adapters = jax.eval_shape(trees, model.params)
    return replace(found[-1], frozen=frozen, adapters=adapters)


def lower_training(
    run: AbstractRun, batch_size: int, length: int, micro_batches: MicroBatches = WHOLE
) -> jax.stages.Lowered:
    """Lower the program of the training loop for batches of `length` tokens, assembled inside it or sent to it whole.

    The number of iterations is an argument, so the compiler counts the FLOPs and bytes of one micro-step, or of one of its
    passes if there are several.
    """
    norm, number = run.max_grad_norm, run.plan.micro_steps_per_dispatch
    step = make_train_step(
        run.objective,
        run.optimizer,
        allocation=run.plan.allocation,
        max_grad_norm=norm,
        micro_batches=micro_batches,
    )
    data = run.training_data(batch_size)
    device_data, draw = dict(data.device_data), draw_of_length(data, length)
    # The same choice as in training: data that fits stays on the devices, and batches are assembled there.
    if fits(device_data):
        program: Any = make_train_steps(step, in_program(data, run.parallel))
        draws = run.parallel.replicated_shapes(_stacked(draw, number))
    else:
        program = make_train_steps(step, lambda device_data, batch: batch)
        draws = run.parallel.split_shapes(_stacked(data.assemble(device_data, draw, np), number), axis=1)
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
    return step.lower(
        frozen, adapters, masks, run.parallel.split_shapes(run.task.batch_shapes(run.rows, batch_size, length))
    )
