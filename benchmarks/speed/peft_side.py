"""torch PEFT's side of a case, as its users run it. Imports torch, and neither jaxpeft nor jax.

Masked-LM batches lie ready as tensors on the device, so that data costs PEFT nothing. In classification each batch is padded to its
longest row, as `DataCollatorWithPadding` does, but in numpy, which is faster; "varlen" puts it into one row without padding instead.
AdamW is torch's fused one. The loss is read only at the end of a round.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.cases import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, WEIGHT_DECAY, Case, targets
from benchmarks.speed.flops import Shape
from benchmarks.speed.varlen import choose, one_row, one_row_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batch = dict[str, torch.Tensor]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Trainer:
    """A case, a method and a variant of it."""

    def __init__(self, case: Case, method: str, workload: Path, variant: str) -> None:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        self._case, self._masked = case, variant.endswith("-masked")
        self.attention, self._attend = "sdpa", None
        if variant == "varlen":
            self.attention, self._attend = choose(DEVICE, getattr(torch, case.dtype))
        self._model = _adapted(case, method, workload).to(DEVICE)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in parameters)
        self._parameters = parameters
        self._optimizer = _optimizer(parameters)
        arrays = dict(np.load(workload / ("rows.npz" if case.task == "classification" else "batches.npz")))
        if case.task == "classification":
            self._ids, self._offsets, self._labels = arrays["input_ids"], arrays["offsets"], arrays["labels"]
            self._order = np.random.default_rng(0)
            self.steps_per_round = -(-len(self._labels) // case.rows)
        else:
            self.steps_per_round = case.steps_per_round
            self._batches = [
                self._tensors({name: values[i] for name, values in arrays.items()})
                for i in range(len(arrays["labels"]))
            ]
        self._model.eval()
        with torch.no_grad():
            self.first_loss = self._exact_loss(
                self._tensors(self._arranged(dict(np.load(workload / "check.npz"))))
            ).item()
        self._model.train()
        self._compiled = torch.compile(self._loss) if variant.startswith("compile") else self._loss
        self._step, self._shapes = 0, Counter[tuple[int, int]]()

    def run_round(self) -> tuple[float, float]:
        """Train for `steps_per_round` steps; return their seconds and the last step's loss."""
        _synchronize()
        self._shapes.clear()
        started = time.perf_counter()
        batches = self._epoch() if self._case.task == "classification" else None
        for _ in range(self.steps_per_round):
            loss = self._update(next(batches) if batches else self._batches[self._step % len(self._batches)])
        value = loss.item()
        _synchronize()
        return time.perf_counter() - started, value

    def work(self) -> dict[str, Any]:
        """Steps, texts, real tokens and computed shapes of the last round."""
        shapes = []
        for (rows, length), count in self._shapes.items():
            head = 1 if self._case.task == "classification" else length
            head = self._batches[0]["positions"].shape[1] if self._masked else head
            shapes.append(Shape(rows, length, head, length, length, count))
        if self._case.task == "classification":
            rows, tokens = len(self._labels), len(self._ids)
        else:
            rows = self._case.rows * self.steps_per_round
            tokens = sum(int(batch["attention_mask"].sum()) for batch in self._batches)
            tokens = tokens * self.steps_per_round // len(self._batches)
        return {
            "updates": self.steps_per_round,
            "rows": rows,
            "tokens": tokens,
            "shapes": [[*vars(shape).values()] for shape in shapes],
        }

    def counted_flops(self) -> float | None:
        """Torch's own count of the matrix products of a step: mean over a round, eager. None without padding: it cannot count these."""
        if self._attend:
            return None
        from torch.utils.flop_counter import FlopCounterMode

        compiled, self._compiled = self._compiled, self._loss
        with FlopCounterMode(display=False) as counter:
            self.run_round()
        self._compiled = compiled
        return counter.get_total_flops() / self.steps_per_round

    def _update(self, batch: Batch) -> torch.Tensor:
        self._step += 1
        if not self._attend:
            self._shapes[tuple(batch["input_ids"].shape)] += 1
        loss = self._compiled(batch)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        return loss.detach()

    def _loss(self, batch: Batch) -> torch.Tensor:
        if self._attend:
            return one_row_loss(self._model, batch, self._attend, longest=self._case.length)
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        if not self._masked:
            return self._model(**inputs, labels=batch["labels"]).loss
        logits = _masked_logits(self._model, inputs, batch["positions"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["masked_labels"].flatten())

    def _exact_loss(self, batch: Batch) -> torch.Tensor:
        """The loss in fp32. In bf16, which transformers computes it in if the model is, two neighbours of 10 are 0.06 apart."""
        if self._masked or self._attend:
            return self._loss(batch)
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        logits = self._model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())

    def _tensors(self, arrays: dict[str, np.ndarray]) -> Batch:
        if self._model.config.model_type == "distilbert":
            arrays.pop("token_type_ids", None)
        weights = arrays.pop("weights", None)
        batch = {name: torch.tensor(values, dtype=torch.long).to(DEVICE) for name, values in arrays.items()}
        if "positions" in batch:
            assert weights is not None
            used = torch.tensor(weights > 0).to(DEVICE)
            batch["masked_labels"] = torch.where(used, batch["labels"], -100)
            # Unused positions point at token 0, which is never masked, so -100 there changes nothing.
            everywhere = torch.full_like(batch["input_ids"], -100)
            batch["labels"] = everywhere.scatter(1, batch["positions"], batch["masked_labels"])
        return batch

    def _epoch(self) -> Any:
        """Batches of the slice in a new random order, each padded to its longest row."""
        order = self._order.permutation(len(self._labels))
        lengths = np.diff(self._offsets)
        for start in range(0, len(order), self._case.rows):
            rows = order[start : start + self._case.rows]
            inside = np.arange(lengths[rows].max()) < lengths[rows][:, None]
            tokens = np.where(inside, self._offsets[rows][:, None] + np.arange(inside.shape[1]), 0)
            ids = np.where(inside, self._ids[tokens], 0)
            batch = {"input_ids": ids, "attention_mask": inside, "token_type_ids": np.zeros_like(ids)}
            if self._attend:
                self._shapes.update((1, int(length)) for length in lengths[rows])
            yield self._tensors(self._arranged({**batch, "labels": self._labels[rows]}))

    def _arranged(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return one_row(arrays) if self._attend else arrays


def _adapted(case: Case, method: str, workload: Path) -> Any:
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    directory = workload / "model"
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    auto = AutoModelForMaskedLM if case.task == "masked-lm" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype)}
    if method == "qlora":
        options["quantization_config"] = _nf4(case)
    base = auto.from_pretrained(directory, **options)
    if method == "full":
        return base
    from peft import LoraConfig, get_peft_model

    common: dict[str, Any] = {"r": RANK, "target_modules": targets(model_type)}
    if case.modules_to_save:
        common["modules_to_save"] = list(case.modules_to_save)
    if case.task == "classification":
        common["task_type"] = "SEQ_CLS"
    if method == "hira":
        from peft import HiraConfig

        return get_peft_model(base, HiraConfig(**common))
    return get_peft_model(base, LoraConfig(lora_alpha=ALPHA, use_dora=method == "dora", **common))


def _nf4(case: Case) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, case.dtype),
        # Only the encoder is quantised, as on jaxpeft's side.
        llm_int8_skip_modules=["cls", "vocab_transform", "vocab_projector", "pre_classifier", "classifier"],
    )


def _optimizer(parameters: list[Any]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=LEARNING_RATE, fused=True)


def _masked_logits(model: Any, inputs: Batch, positions: torch.Tensor) -> torch.Tensor:
    """Logits of only the masked tokens: their hidden states are gathered before the head."""
    bare = model.base_model.model if hasattr(model, "peft_config") else model
    hidden = bare.base_model(**inputs)[0]
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    hidden = hidden[rows, positions]
    if bare.config.model_type == "distilbert":
        return bare.vocab_projector(bare.vocab_layer_norm(bare.activation(bare.vocab_transform(hidden))))
    return bare.cls(hidden)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def about() -> dict[str, Any]:
    """The device and the versions."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return {
        "device": "gpu" if DEVICE == "cuda" else "cpu",
        "device_name": name,
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
    }


def device_memory() -> int | None:
    """Peak bytes on the device; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def matrix_rate(m: int, k: int, n: int, *, dtype: str, repeats: int) -> float:
    """Operations a second of `[m, k] × [k, n]`, the second as a layer holds it; mean over `repeats` in a row."""
    kind = getattr(torch, dtype)
    x, weight = torch.randn(m, k, dtype=kind, device=DEVICE), torch.randn(n, k, dtype=kind, device=DEVICE)
    torch.nn.functional.linear(x, weight)
    _synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.nn.functional.linear(x, weight)
    _synchronize()
    return repeats * 2 * m * k * n / (time.perf_counter() - started)
