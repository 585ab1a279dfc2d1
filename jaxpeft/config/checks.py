"""Check a configuration before anything is loaded: ranges, and options that exclude each other."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxpeft.adapters import METHODS
from jaxpeft.config.adapter import AdapterConfig, PruningConfig, redraws_entries
from jaxpeft.config.contextual import ContextualConfig
from jaxpeft.config.data import DataConfig
from jaxpeft.config.embedding import EmbeddingConfig
from jaxpeft.config.model import ModelConfig
from jaxpeft.config.training import ClusterConfig, EvaluationConfig, TrainingConfig
from jaxpeft.errors import InputError, check_choice
from jaxpeft.pruning import SCHEDULES
from jaxpeft.tasks import FLAG_VALUES, TASKS

# The registries of these names check them, and may have more names than the flags had when this process began.
_IN_A_REGISTRY = {("adapter", "method"), ("pruning", "criterion"), ("pruning", "schedule"), ("model", "quantization")}


_LABEL_FLAGS = ("label_names", "num_labels", "regression", "drop_unlabelled", "label_columns", "label_delimiter")


def check_choices(**sections: object) -> None:
    """Raise InputError for a value that its field's `Literal` does not list. Flags are checked already; Python's values are not."""
    for section, config in sections.items():
        for name, (choices, others) in _choices(type(config)).items():  # type: ignore[arg-type]
            value = getattr(config, name)
            if (section, name) not in _IN_A_REGISTRY and not isinstance(value, others):
                check_choice(f"{section}.{name}", value, choices)


@functools.cache  # the annotations are text, and evaluating them takes a millisecond
def _choices(kind: type) -> dict[str, tuple[list[Any], tuple[type, ...]]]:
    """Field → the values that its `Literal` lists, for the fields that have one, and the types that it may have instead."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        known = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
        if known:
            plain = [get_origin(part) or part for part in parts]  # list[float] → list
            others = tuple(part for part in plain if isinstance(part, type) and part is not type(None))
            found[name] = ([*known, None] if type(None) in parts else known, others)
    return found


def check_ranges(
    *,
    model: ModelConfig,
    data: DataConfig,
    adapter: AdapterConfig,
    pruning: PruningConfig,
    contextual: ContextualConfig,
    embedding: EmbeddingConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    cluster: ClusterConfig,
    seed: int,
) -> None:
    """Raise InputError for a number out of its range."""
    t, p, a, d, m, e, c, x = training, pruning, adapter, data, model, evaluation, cluster, contextual
    left_out = {"ffn_sparsity": x.ffn_sparsity, "qkv_sparsity": x.qkv_sparsity}
    block = m.quantization_block_size
    checks = [
        ("adapter.rank", a.rank, a.rank is None or a.rank >= 1, "at least 1, or null"),
        ("adapter.alpha", a.alpha, a.alpha is None or a.alpha > 0, "above 0, or null"),
        ("adapter.dropout", a.dropout, 0 <= a.dropout < 1, "at least 0 and below 1"),
        ("adapter.calibration_batches", a.calibration_batches, a.calibration_batches >= 1, "at least 1"),
        ("adapter.rank_dropout", a.rank_dropout, 0 <= (a.rank_dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("adapter.module_dropout", a.module_dropout, 0 <= (a.module_dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("adapter.init_r", a.init_r, a.init_r is None or a.init_r >= 1, "at least 1, or null"),
        ("adapter.target_r", a.target_r, a.target_r is None or a.target_r >= 1, "at least 1, or null"),
        ("adapter.beta1", a.beta1, a.beta1 is None or 0 < a.beta1 < 1, "between 0 and 1, or null"),
        ("adapter.beta2", a.beta2, a.beta2 is None or 0 < a.beta2 < 1, "between 0 and 1, or null"),
        ("adapter.num_virtual_tokens", a.num_virtual_tokens, a.num_virtual_tokens is None or a.num_virtual_tokens >= 1,
         "at least 1, or null"),
        ("adapter.block_size", a.block_size, a.block_size is None or a.block_size >= 1, "at least 1, or null"),
        ("adapter.random_seed", a.random_seed, 0 <= (a.random_seed or 0) < 2**32, "from 0 to 4294967295, or null"),
        ("adapter.sparsity", a.sparsity, 0 <= (a.sparsity or 0) < 1, "at least 0 and below 1, or null"),
        ("adapter.channels", a.channels, a.channels is None or a.channels >= 1, "at least 1, or null"),
        ("adapter.heads", a.heads, a.heads is None or a.heads >= 1, "at least 1, or null"),
        ("model.dropout", m.dropout, 0 <= (m.dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("pruning.sparsity", p.sparsity, 0 <= p.sparsity < 1, "at least 0 and below 1"),
        ("pruning.begin", p.begin, p.begin is None or 0 < p.begin < 1, "between 0 and 1"),
        ("pruning.end", p.end, 0 < p.end <= 1, "above 0 and at most 1"),
        ("pruning.every_steps", p.every_steps, p.every_steps >= 1, "at least 1"),
        ("pruning.rounds", p.rounds, p.rounds >= 1, "at least 1"),
        ("pruning.rewind", p.rewind, 0 <= p.rewind < 1, "at least 0 and below 1"),
        ("pruning.drop_fraction", p.drop_fraction, 0 < p.drop_fraction < 1, "between 0 and 1"),
        *((f"contextual.{name}", value, all(0 <= share < 1 for share in (value if isinstance(value, list) else [value])),
           "at least 0 and below 1, or a list of such numbers") for name, value in left_out.items()),
        ("contextual.estimator_rank", x.estimator_rank, x.estimator_rank >= 1, "at least 1"),
        ("contextual.dense_share", x.dense_share, 0 <= x.dense_share < 1, "at least 0 and below 1"),
        ("embedding.scale", embedding.scale, embedding.scale > 0, "above 0"),
        ("training.num_steps", t.num_steps, t.num_steps is None or t.num_steps >= 1, "at least 1, or null"),
        ("training.num_epochs", t.num_epochs, t.num_epochs > 0, "above 0"),
        ("training.batch_size", t.batch_size, t.batch_size >= 1, "at least 1"),
        ("training.micro_batch_size", t.micro_batch_size, t.micro_batch_size == "auto" or t.micro_batch_size >= 1, "at least 1, or auto"),
        ("training.accumulation_steps", t.accumulation_steps, t.accumulation_steps >= 1, "at least 1"),
        ("training.learning_rate", t.learning_rate, t.learning_rate > 0, "above 0"),
        ("training.loraplus_lr_ratio", t.loraplus_lr_ratio, t.loraplus_lr_ratio is None or t.loraplus_lr_ratio >= 1, "at least 1, or null"),
        ("training.loraplus_lr_embedding", t.loraplus_lr_embedding, t.loraplus_lr_embedding > 0, "above 0"),
        ("training.warmup_steps", t.warmup_steps, (t.warmup_steps or 0) >= 0, "at least 0, or null"),
        ("training.label_smoothing", t.label_smoothing, 0 <= t.label_smoothing < 1, "at least 0 and below 1"),
        ("training.class_weights", t.class_weights, _are_weights(t.class_weights),
         "numbers of at least 0, and one of them above 0, or balanced, or null"),
        ("training.weight_decay", t.weight_decay, t.weight_decay >= 0, "at least 0"),
        ("training.max_grad_norm", t.max_grad_norm, t.max_grad_norm >= 0, "at least 0"),
        ("training.micro_steps_per_dispatch", t.micro_steps_per_dispatch, t.micro_steps_per_dispatch >= 1, "at least 1"),
        ("training.log_every_steps", t.log_every_steps, t.log_every_steps >= 1, "at least 1"),
        ("training.eval_every_steps", t.eval_every_steps, (t.eval_every_steps or 1) >= 1, "at least 1, or null"),
        ("training.early_stopping_patience", t.early_stopping_patience, (t.early_stopping_patience or 1) >= 1, "at least 1, or null"),
        ("data.label_names", d.label_names, d.label_names is None or 1 < len(set(d.label_names)) == len(d.label_names),
         "two or more names, each given once, or null"),
        ("data.label_columns", d.label_columns, d.label_columns is None or 1 < len(set(d.label_columns)) == len(d.label_columns),
         "two or more columns, each given once, or null"),
        ("data.label_delimiter", d.label_delimiter, d.label_delimiter != "", "at least one character, or null"),
        ("data.num_labels", d.num_labels, d.num_labels is None or d.num_labels >= 2,
         "at least 2, or null; data.regression true predicts the labels as numbers"),
        ("data.max_length", d.max_length, d.max_length >= 8, "at least 8"),
        ("data.doc_stride", d.doc_stride, (d.doc_stride or 0) >= 0, "at least 0, or null"),
        ("data.max_answer_length", d.max_answer_length, d.max_answer_length >= 1, "at least 1"),
        ("data.mask_ratio", d.mask_ratio, 0 < d.mask_ratio < 1, "between 0 and 1"),
        ("data.bucket_lengths", d.bucket_lengths, min(d.bucket_lengths, default=0) >= 1, "lengths of at least 1"),
        ("model.quantization_block_size", block, block in (64, 128, 256, 512, 1024, 2048, 4096), "a power of two, 64 to 4096"),
        ("evaluation.batch_size", e.batch_size, e.batch_size >= 1, "at least 1"),
        ("evaluation.max_batches", e.max_batches, e.max_batches is None or e.max_batches >= 1, "at least 1, or null"),
        ("evaluation.max_test_batches", e.max_test_batches, e.max_test_batches is None or e.max_test_batches >= 1, "at least 1, or null"),
        ("evaluation.pseudo_perplexity_rows", e.pseudo_perplexity_rows, e.pseudo_perplexity_rows >= 1, "at least 1"),
        ("cluster.num_processes", c.num_processes, c.num_processes is None or c.num_processes >= 1, "at least 1, or null"),
        ("cluster.process_id", c.process_id, 0 <= (c.process_id or 0) < (c.num_processes or math.inf),
         "at least 0 and below cluster.num_processes, or null"),
        ("seed", seed, 0 <= seed < 2**32, "from 0 to 4294967295"),
    ]  # fmt: skip
    for flag, value, fine, wanted in checks:
        if not fine:
            raise InputError(f"{flag} is {value}; it must be {wanted}")


def _are_weights(given: Any) -> bool:
    weights = list(given.values() if isinstance(given, dict) else given if isinstance(given, list) else [1.0])
    named = isinstance(given, dict)  # classes that are not named have the weight 1
    return all(math.isfinite(weight) and weight >= 0 for weight in weights) and (named or any(weights))


def check_combinations(
    *,
    task: str,
    output_dir: str,
    distributed: bool,
    model: ModelConfig,
    data: DataConfig,
    adapter: AdapterConfig,
    pruning: PruningConfig,
    contextual: ContextualConfig,
    training: TrainingConfig,
    embedding: EmbeddingConfig,
    cluster: ClusterConfig,
) -> None:
    """Raise InputError for options that exclude each other, or that need an option that is not set."""
    if "://" in output_dir:  # pathlib would take it as a relative path
        raise InputError(f"output_dir '{output_dir}' is a URL; give a directory (a bucket can be mounted with gcsfuse)")
    if not data.name and not data.train_file:
        raise InputError("no data: give data.name (python-docs, wikitext-2-raw-v1, glue/sst2, …) or data.train_file")
    if data.name and data.train_file:
        raise InputError(
            f"data.name '{data.name}' and data.train_file '{data.train_file}' exclude each other: set one to null"
        )
    _check_labels(task, data)
    _check_own_flags(task, data)
    _check_embeddings(task, data, embedding)
    _check_files(data)
    given = [name for name, value in vars(cluster).items() if value is not None]
    if given and not distributed:
        raise InputError(f"cluster.{given[0]} {getattr(cluster, given[0])} needs --distributed")
    # A method is imported, and jax with it, only if one of these two options is set.
    if pruning.sparsity and not _has("prunable", adapter.method):
        raise InputError(
            f"pruning.sparsity {pruning.sparsity} needs adapter.method to be one of {_those_with('prunable')}, not "
            f"'{adapter.method}'; set it to 0"
        )
    _check_redraw(adapter, pruning)
    if training.loraplus_lr_ratio and not _has("loraplus", adapter.method):
        raise InputError(
            f"training.loraplus_lr_ratio {training.loraplus_lr_ratio:g} needs adapter.method to be one of "
            f"{_those_with('loraplus')}, not '{adapter.method}'; set it to null"
        )
    if data.packing and not TASKS[task].can_pack:
        raise InputError(f"data.packing is only for {_tasks_with('can_pack')}, and the task is {task}; set it to false")
    if data.packing and adapter.method == "prompt-tuning":
        raise InputError(
            "data.packing cannot be used with prompt-tuning, which puts its tokens in front of a row; set it to false"
        )
    if adapter.method == "head" and not TASKS[task].has_head:
        raise InputError(
            f"adapter.method 'head' trains only the head, and {task} has none; choose another method, such as lora"
        )
    if adapter.method == "full" and model.quantization != "none":
        raise InputError(
            "adapter.method 'full' trains every weight, which a quantised base does not allow: set model.quantization to none"
        )
    if contextual.is_on and adapter.method == "full":
        raise InputError(
            "contextual sparsity leaves out channels of a frozen base, and adapter.method 'full' trains the base: set "
            "contextual.ffn_sparsity and contextual.qkv_sparsity to 0"
        )
    for name, value in (("label_smoothing", training.label_smoothing), ("class_weights", training.class_weights)):
        if value not in (None, 0) and not TASKS[task].weighs_classes:
            raise InputError(
                f"training.{name} {value} is for {_tasks_with('weighs_classes')}, and the task is {task}; leave it out"
            )
    if training.metric:
        allowed = TASKS[task].known_metrics
        if training.metric not in allowed:
            raise InputError(
                f"training.metric '{training.metric}' is not measured for {task}; choose from {', '.join(allowed)}"
            )


def _check_labels(task: str, data: DataConfig) -> None:
    """Raise InputError for options of the labels that exclude each other, or that the task cannot use."""
    if data.text_pair_column is not None and not TASKS[task].reads_pairs:
        raise InputError(
            f"data.text_pair_column '{data.text_pair_column}' cannot be used in {task}, which reads one text a row; leave it out"
        )
    values = {name: getattr(data, name) for name in _LABEL_FLAGS}
    given = [name for name, value in values.items() if value not in (None, False)]
    if given and not TASKS[task].reads_labels and not TASKS[task].reads_scores:
        raise InputError(f"data.{given[0]} is for tasks with labels, and {task} reads none; leave it out")
    for name in given:
        if name not in TASKS[task].label_flags:
            tasks = " and ".join(
                other for other in FLAG_VALUES if TASKS[other].reads_labels and name in TASKS[other].label_flags
            )
            raise InputError(f"data.{name} is for {tasks}, and {task} cannot use it; leave it out")
    for name in ("label_column", "label_names", "num_labels", "label_delimiter"):
        if data.label_columns is not None and getattr(data, name) is not None:
            raise InputError(
                f"data.label_columns name the classes, so data.{name} has no meaning beside them; leave one of the two out"
            )
    if data.regression and len(given) > 1 and given[0] != "regression":
        raise InputError(
            f"data.{given[0]} is for classes, and data.regression predicts numbers: set one of them to null or false"
        )


def _check_own_flags(task: str, data: DataConfig) -> None:
    """Raise InputError for a flag that is only for other tasks. Tasks are imported, and jax with them, only if it is given."""
    for name in ("doc_stride", "max_answer_length", "whole_word_masking", "join_texts"):
        value = getattr(data, name)
        if value != getattr(DataConfig, name) and name not in TASKS[task].own_flags:
            owners = " and ".join(other for other in TASKS if name in TASKS[other].own_flags)
            said = str(value).lower() if isinstance(value, bool) else value
            raise InputError(f"data.{name} {said} is for {owners}, and the task is {task}; leave it out")


def _check_embeddings(task: str, data: DataConfig, embedding: EmbeddingConfig) -> None:
    """Raise InputError for options of sentence embeddings with another task, and for a third text without a second one."""
    given = {
        f"embedding.{name}": value for name, value in vars(embedding).items() if value != getattr(EmbeddingConfig, name)
    }
    if data.negative_column:
        given["data.negative_column"] = data.negative_column
    if given and not TASKS[task].reads_negatives:  # only then, because a task loads jax
        flag, value = next(iter(given.items()))
        raise InputError(
            f"{flag} {value} is for {_tasks_with('reads_negatives')}, and the task is {task}; leave it out"
        )
    if data.negative_column and not data.text_pair_column:
        raise InputError(
            f"data.negative_column '{data.negative_column}' needs the text that belongs to the first one; give its column "
            "with data.text_pair_column"
        )


def _check_files(data: DataConfig) -> None:
    """Raise InputError for options of files that no file has, or that are given without a file."""
    for name in ("validation_file", "test_file", "column_names", "delimiter", "quotes", "encoding", "field", "glob"):
        value = getattr(data, name)
        if value not in (None, False) and not data.train_file:
            raise InputError(
                f"data.{name} {value} is for files, and the data is '{data.name}': leave it out, or give data.train_file"
            )
    if (
        data.delimiter is not None
        and data.delimiter not in ("tab", "\\t")
        and (len(data.delimiter) != 1 or data.delimiter in '"\r\n')
    ):
        raise InputError(f"data.delimiter is {data.delimiter!r}; it must be one character, or tab")
    try:
        "".encode(data.encoding or "utf-8")
    except (LookupError, UnicodeError, ValueError) as error:
        raise InputError(
            f"data.encoding is '{data.encoding}', which Python does not know; give one such as utf-8, latin-1, cp1252 or utf-16"
        ) from error


def _check_redraw(adapter: AdapterConfig, pruning: PruningConfig) -> None:
    """Raise InputError for options that exclude a redraw of the entries of a sparse update, or have no meaning for it."""
    p, method = pruning, adapter.method
    chosen = p.schedule != PruningConfig.schedule and not p.sparsity  # a method is imported only then
    if chosen and SCHEDULES[p.schedule].redraws and _has("constants", method) and not _has("redrawn", method):
        raise InputError(
            f"pruning.schedule {p.schedule} redraws the entries of {_those_with('redrawn')}, but what '{method}' trains is chosen once; "
            "set it to one-shot, or prune with pruning.sparsity"
        )
    if not redraws_entries(adapter, pruning):
        return
    for name in ("criterion", "scope", "structure"):
        value, default = getattr(p, name), getattr(PruningConfig, name)
        if value != default:
            raise InputError(
                f"pruning.{name} {value} has no meaning for pruning.schedule {p.schedule} with '{method}', which exchanges the entries of "
                f"each layer that have the smallest values; set it to {default}"
            )
    if adapter.save_precomputed_indices is False:
        raise InputError(
            f"adapter.save_precomputed_indices false cannot be used with pruning.schedule {p.schedule}: the base's weights do not "
            "say which entries were redrawn; set it to true"
        )


def _tasks_with(attribute: str) -> str:
    """The values of `--task` whose class has a true `attribute`."""
    return " and ".join(name for name in FLAG_VALUES if getattr(TASKS[name], attribute))


def _has(group: str, method: str) -> bool:
    """True if `method` declares anything in its field `group`. The baselines are not in the table and declare nothing."""
    return method in METHODS and bool(getattr(METHODS[method], group, ()))


def _those_with(group: str) -> str:
    return ", ".join(method for method in METHODS if _has(group, method))
