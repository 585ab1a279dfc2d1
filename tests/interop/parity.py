"""The same adapter on both sides: torch PEFT's, and what `load_adapter` makes of its file."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch_side

from jaxpeft import BaseInfo, apply, load_adapter, save_adapter
from jaxpeft.tasks import task_for

LABELS = np.array([0, 1, 1, 0], np.int32)


@dataclass(frozen=True)
class Pair:
    """PEFT's model, the directory it was saved to, and ours of it: `frozen, adapters, method`."""

    peft: Any
    directory: Path
    model: Any
    frozen: dict
    adapters: dict
    method: Any
    inputs: dict

    def logits(self, adapters):
        """Ours; differentiable."""
        inputs = self.model.inputs(self.inputs, **room_for(self.method))
        return self.model.head.logits(apply(self.model.module, self.frozen, adapters, self.method, **inputs))

    def save(self, directory, adapters):
        """Write ours as PEFT would."""
        save_adapter(directory, adapters, self.method, base=BaseInfo.of(self.model), frozen=self.frozen)
        return directory


def in_float64(pair):
    """Ours in double precision: weights, adapters, and what layers compute in. Inside `jax.enable_x64`."""
    model, frozen, adapters = tiny.doubled(pair.model, pair.frozen, pair.adapters)
    return replace(pair, model=model, frozen=frozen, adapters=adapters)


def room_for(method):
    """What `Model.inputs` must know of `method`."""
    tokens = getattr(method, "virtual_tokens", 0)
    return {"virtual_tokens": tokens} if tokens else {}


def make_pair(case, base, model, directory, *, trained):
    """An adapter of torch PEFT, `trained` (every tensor moved by noise) or fresh, and ours of its file."""
    import peft
    import torch

    torch.manual_seed(3)
    kinds = {
        "classification": "SEQ_CLS",
        "token-classification": "TOKEN_CLS",
        "sentence-embeddings": "FEATURE_EXTRACTION",
    }
    options = {**case.options, **({"task_type": kinds[case.task]} if case.task in kinds else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say of its own options
        config = getattr(peft, case.config)(**options)
        theirs = peft.get_peft_model(torch_side.load_torch(base, case.task), config).eval()
    if trained:
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(directory)
    frozen, adapters, method = load_adapter(directory, model.params)
    return Pair(theirs, directory, model, frozen, adapters, method, torch_side.batch(case.model_type))


def silenced(pair):
    """PEFT's logits without its adapter."""
    if pair.peft.active_peft_config.is_prompt_learning:  # whose disable_adapter() asks an encoder how it generates
        return torch_side.torch_logits(pair.peft.base_model, pair.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that biases stay, where they train
        with pair.peft.disable_adapter():
            return torch_side.torch_logits(pair.peft, pair.inputs)


def config_meaning(case, directory):
    """PEFT's own reading of a config file, without what names the base, the layers or the version."""
    from peft import PeftConfig

    beside = (
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version"),  # the base
        *(
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        ),  # named in full
        "feedforward_modules",  # an expression beside full names
        *("megatron_core", "megatron_config", "qalora_group_size"),  # of features that are off
        *(("rank_pattern",) if case.config == "HiraConfig" else ()),  # which PEFT 0.21 writes and does not heed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PeftConfig.from_pretrained(directory).to_dict()
    return {key: value for key, value in config.items() if key not in beside and value not in (None, {}, [])}


def torch_loss(logits, pair, task):
    """Cross-entropy: of two labels, of a token or a tag at every place that is no padding, or of the second texts of two pairs."""
    import torch

    if task == "sentence-embeddings":
        mask = torch.tensor(pair.inputs["attention_mask"])[..., None].to(logits.dtype)
        texts = torch.nn.functional.normalize((logits * mask).sum(1) / mask.sum(1), dim=-1)
        return torch.nn.functional.cross_entropy(20 * texts[::2] @ texts[1::2].T, torch.arange(2))
    if task == "classification":
        return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS, dtype=torch.long))
    # Not at padding: torch's embeddings give its row no gradient, which no loss that counts padding could be compared to.
    labels = np.where(pair.inputs["attention_mask"] > 0, token_labels(logits.shape), -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels, dtype=torch.long).flatten())


def our_loss(logits, pair, task):
    import optax

    if task == "sentence-embeddings":
        kind = task_for(task)
        batch = {"weights": np.ones(2, np.float32), "text_ids": np.arange(4, dtype=np.int32)}
        return kind.losses(kind.read_out(logits, pair.inputs), batch).mean()
    if task == "classification":
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, token_labels(logits.shape))
    return losses.mean(where=pair.inputs["attention_mask"] > 0)


def token_labels(shape):
    """A label in the vocabulary for every place of `[batch, seq, vocabulary]`."""
    return np.random.default_rng(5).integers(0, shape[-1], shape[:-1]).astype(np.int32)


def torch_inputs(pair):
    import torch

    inputs = {key: torch.tensor(value, dtype=torch.long) for key, value in pair.inputs.items()}
    if pair.model.model_type == "distilbert":
        del inputs["token_type_ids"]
    return inputs


def peft_tensors(peft, values):
    """`values` (parameter's name → tensor) under the keys of PEFT's file, as numpy."""
    from peft import get_peft_model_state_dict

    state = {**{name: tensor.detach() for name, tensor in peft.state_dict().items()}, **values}
    found = get_peft_model_state_dict(peft, state_dict=state)
    if "prompt_embeddings" in found:  # which PEFT does not take from the state
        found["prompt_embeddings"] = state["prompt_encoder.default.embedding.weight"]
    return without_copies({key: tensor.detach().float().numpy() for key, tensor in found.items()})


def without_copies(tensors):
    """A PEFT file less what `bias="all"` repeats in it: the biases of a wrapped head, and of a tied decoder."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not re.search(r"\.(modules_to_save|original_module|decoder)\.", key)
    }


def relative_error(actual, expected):
    """Largest difference over the largest value."""
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
