"""Read datasets of the Hugging Face hub into tables, with a way out if the hub does not answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from jaxpeft.data.files import quiet_datasets
from jaxpeft.data.glue import GLUE
from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetDict

WIKITEXT = ("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1")
KNOWN_NAMES = ("python-docs", *WIKITEXT, *(f"glue/{task}" for task in GLUE))


def hub_id(name: str, subset: str | None) -> tuple[str, str | None]:
    """The hub's (repository, config name) for a dataset's name. `KNOWN_NAMES` lists the short names.

    Raises InputError on a near miss of a short name, on a short name with a subset, and on a name that cannot be a
    repository.
    """
    # A name that resembles a short name is most likely a misspelt one, and must not be searched on the hub.
    is_short = name.startswith(("glue/", "wikitext-")) or ("/" not in name and did_you_mean(name, KNOWN_NAMES) != "")
    if not is_short and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return name, subset
    if name not in KNOWN_NAMES:
        raise InputError(
            f"dataset '{name}' is unknown{did_you_mean(name, KNOWN_NAMES)}; known: {', '.join(KNOWN_NAMES)}"
        )
    if subset is not None:
        raise InputError(
            f"data.subset '{subset}' cannot be set for the dataset '{name}', which implies its own; leave it out"
        )
    family, _, task = name.partition("/")
    return ("nyu-mll/glue", task) if family == "glue" else ("Salesforce/wikitext", name)


def read_hub(name: str, *, subset: str | None = None) -> DatasetDict:
    """Every split of a hub dataset, downloaded on first use and read from the `datasets` cache afterwards.

    If the hub is unreachable, the cache is read after about 20 seconds (`huggingface_hub` repeats its request five
    times). With HF_HUB_OFFLINE=1 the cache is read at once. Raises InputError if the dataset or the subset does not
    exist, needs authentication, or is neither reachable nor cached.
    """
    import datasets

    repository, config_name = hub_id(name, subset)
    with quiet_datasets():
        try:
            return datasets.load_dataset(repository, config_name)
        # OSError: unreachable, unknown, gated, HTTP errors. ValueError: unknown or missing config, malformed id.
        # RuntimeError: a repository of the loading-script era.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise InputError(_no_dataset(name, repository, config_name, error)) from error


def _no_dataset(name: str, repository: str, config_name: str | None, error: Exception) -> str:
    # Without the example of usage that datasets adds: the message must be one line.
    reason = " ".join(str(error.__cause__ or error).split()).partition(" Example of usage")[0].rstrip(".")
    what = f"dataset '{name}' (hub: {repository}{f', {config_name}' if config_name else ''}) cannot be loaded: {reason}"
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        return f"{what}; set data.subset to one of these"
    if isinstance(error, ConnectionError):
        return (
            f"{what}; check the network and HF_ENDPOINT, or give local files: data.train_file and data.validation_file"
        )
    return f"{what}{did_you_mean(name, KNOWN_NAMES)}; check the name and HF_TOKEN, or give local files: data.train_file"
