"""The same models in torch: bases written by transformers, adapters read by PEFT. Imports torch only when it is used."""

import json
import warnings

import numpy as np
import tiny

ROWS, LENGTH = 4, 12


def write_base(directory, model_type, task="masked-lm", *, num_labels=2, layers=2, seed=0, **config):
    """Save a tiny torch model, every parameter drawn at random, and return its directory; `task` "encoder" has no head."""
    import torch
    from transformers import AutoConfig

    depth = "n_layers" if model_type == "distilbert" else "num_hidden_layers"
    values = {**tiny.CONFIGS[model_type], depth: layers, "num_labels": num_labels, **config}
    model = auto_class(task).from_config(AutoConfig.for_model(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "LayerNorm.weight" in name or "layer_norm.weight" in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + scale)
    model.save_pretrained(directory)
    return directory


def auto_class(task):
    """Transformers' class that makes the torch model of a task; of an "encoder", it has no head."""
    import transformers

    names = {
        "masked-lm": "ForMaskedLM",
        "classification": "ForSequenceClassification",
        "token-classification": "ForTokenClassification",
        "question-answering": "ForQuestionAnswering",
        "encoder": "",
        "sentence-embeddings": "",
    }
    return getattr(transformers, f"AutoModel{names[task]}")


def load_torch(directory, task="masked-lm", **options):
    """The torch model in `directory`, ready to be asked."""
    import torch

    # SHiRA builds sparse tensors. torch then checks their indices, or warns that it does not.
    torch.sparse.check_sparse_tensor_invariants.enable()
    loaded = auto_class(task).from_pretrained(directory, **options)
    return loaded if options.get("output_loading_info") else loaded.eval()


def load_peft(model, directory):
    """`model` with the adapter in `directory`, by PEFT; any warning of it, or a key it does not know, is an error."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said of every module_to_save called "lm_head", whatever the file holds.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "Unsupported layer type '<class 'torch.nn.modules.normalization")  # LN tuning
        # Said of every VeRA without its projections, also where PEFT draws the same ones again.
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A and vera_B")
        adapted = PeftModel.from_pretrained(model, directory)
        again = set_peft_model_state_dict(adapted, load_file(directory / "adapter_model.safetensors"))
    assert set(again.unexpected_keys) <= {"prompt_embeddings"}  # which PEFT loads by another way
    return adapted.eval()


def batch(model_type):
    """Token ids, mask and types, each `[4, 12]` int32; every other row ends in padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, tiny.VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1::2, -4:] = 0
    ids[mask == 0] = tiny.CONFIGS[model_type]["pad_token_id"]
    types = np.zeros_like(ids)
    if model_type == "bert":
        types[:, 5:] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def logits_of(output):
    """Logits of a torch model's output, those of start and end on a last axis, or the vectors of the tokens if it has no head."""
    if "start_logits" in output:
        import torch

        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state


def torch_logits(model, inputs):
    """Logits of a torch model (or PEFT's) as numpy."""
    import torch

    inputs = {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
    if model.config.model_type == "distilbert":
        del inputs["token_type_ids"]
    with torch.no_grad():
        return logits_of(model(**inputs)).numpy()


def tensors_of(directory, name="adapter_model.safetensors"):
    from safetensors.numpy import load_file

    return load_file(directory / name)


def config_of(directory, name="adapter_config.json"):
    return json.loads((directory / name).read_text())
