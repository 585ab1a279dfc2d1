"""`jaxpeft quantize`: write a model with its linear layers in 4 or 8 bits, in bitsandbytes' format."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config import ModelConfig
from jaxpeft.config.parsing import Parser
from jaxpeft.models.heads import HEADS
from jaxpeft.quantization import NUMBER_FORMATS


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and write the model."""
    parser = Parser(
        prog=prog, description="Write a model with the linear layers of its encoder quantised, in bitsandbytes' format."
    )
    parser.add_argument("model", help="Hub id, directory or package:module/folder, as in --model.name.")
    parser.add_argument("output", help="A new directory for the model.")
    parser.add_argument(
        "--data_type", choices=list(NUMBER_FORMATS), default="nf4", help="Number format of the weights."
    )
    parser.add_argument(
        "--block_size",
        type=int,
        default=ModelConfig.quantization_block_size,
        help="Weights that share one scale in 4 bits, a power of two from 64 to 4096.",
    )
    parser.add_argument(
        "--double_quantization", type=bool, default=True, help="Also store the scales of 4-bit weights in 8 bits."
    )
    parser.add_argument(
        "--task",
        choices=list(HEADS),
        default=None,
        help="Write only the weights of the model for this task; null: the checkpoint's weights for both. torch can load a "
        "bare BERT as a masked language model only if it was written for masked-lm.",
    )
    values = parser.parse_args(list(argv))
    guarded(lambda: quantize(**values.as_dict()), prog)


def quantize(
    model: str, output: str, data_type: str, block_size: int, double_quantization: bool, task: str | None
) -> None:
    """Quantise the model named `model` into the new directory `output`, and print the sizes before and after."""
    from jaxpeft.interop.quantize import quantize_model
    from jaxpeft.quantization import Quantization
    from jaxpeft.report.console import log
    from jaxpeft.runs.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    quantization = Quantization(data_type, block_size, double_quantization)
    sizes = quantize_model(model, output, quantization, task=task)
    bits = 8 * sizes.quantized_bytes / sizes.weights
    log(
        f"{sizes.num_kernels} linear layers in {quantization}: {_megabytes(4 * sizes.weights)} in float32 → "
        f"{_megabytes(sizes.quantized_bytes)}, {bits:.3f} bits a weight"
    )
    log(f"whole model in {output}: {_megabytes(sizes.full_bytes)} in float32 → {_megabytes(sizes.file_bytes)} on disk")
    log(f"--model.name {output} trains on it; from_pretrained('{output}') loads it in torch through bitsandbytes")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
