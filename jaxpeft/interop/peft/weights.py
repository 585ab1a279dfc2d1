"""The weights in an adapter's directory: PEFT's file, or a packed one in its place (`packed.py`)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.interop.peft.packed import Tensors, pack, unpack
from jaxpeft.interop.transformers_files import new_directory

CONFIG_FILE, WEIGHTS_FILE, PACKED_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.packed.safetensors",
)


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray], *, packed: bool) -> Path:
    """Write `tensors`, in torch's layout, as the only weights in `directory`; return their file."""
    from safetensors.numpy import save_file

    file, other = (
        directory / name for name in ((PACKED_FILE, WEIGHTS_FILE) if packed else (WEIGHTS_FILE, PACKED_FILE))
    )
    stored, metadata = pack(tensors) if packed else (dict(tensors), {"format": "pt"})
    save_file(stored, file, metadata=metadata)
    other.unlink(missing_ok=True)  # of an adapter that was saved here before
    return file


def weights_file(directory: Path) -> Path:
    """The file of the weights in `directory`, packed or not.

    Raises:
        InputError: if there is none, only a pickled one, or more than one.
    """
    found = [file for name in (WEIGHTS_FILE, PACKED_FILE) if (file := directory / name).is_file()]
    if len(found) > 1:
        raise InputError(f"'{directory}' has {WEIGHTS_FILE} and {PACKED_FILE}; remove the one that is not wanted")
    if found:
        return found[0]
    if (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"{directory / 'adapter_model.bin'} is a pickle, which can run code when loaded; "
            "load it in torch PEFT and save_pretrained() it again"
        )
    raise InputError(f"no {WEIGHTS_FILE} in '{directory}'")


def read_tensors(file: Path) -> Tensors:
    """Read a `weights_file`, in torch's layout and in the dtypes of the file.

    Raises:
        InputError: if it is damaged.
    """
    import ml_dtypes  # noqa: F401  (gives numpy the bf16 that some files are in)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            stored, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return unpack(stored, metadata, str(file)) if file.name == PACKED_FILE else stored


def repack(directory: Path | str, output: Path | str, *, packed: bool) -> tuple[int, int]:
    """Write the adapter in `directory`, with its config and card, to the new directory `output`, packed or in PEFT's form.

    The base is not needed, and the adapter may be PEFT's own.

    Returns:
        the bytes of the weights before and after.

    Raises:
        InputError: as `weights_file` and `read_tensors`; if `directory` has no config, its weights have that form already, or
            `output` is not new.
    """
    directory, target = Path(directory), new_directory(output)
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"no {CONFIG_FILE} in '{directory}': it is not an adapter's directory")
    source = weights_file(directory)
    if (source.name == PACKED_FILE) == packed:
        raise InputError(f"the adapter in '{directory}' is {'packed already' if packed else 'not packed'}")
    tensors = read_tensors(source)
    target.mkdir(parents=True, exist_ok=True)
    written = write_tensors(target, tensors, packed=packed)
    for path in sorted(directory.iterdir()):
        if path.is_file() and path != source:
            shutil.copyfile(path, target / path.name)
    return source.stat().st_size, written.stat().st_size
