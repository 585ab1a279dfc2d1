"""`jaxpeft pack`: a pruned adapter without its zeros; `unpack` is the way back."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser


def main(argv: Sequence[str], *, prog: str, packed: bool = True) -> None:
    """Parse the arguments and write the adapter: packed, or with `packed` false in PEFT's form."""
    form = "without its zeros: a bit mask and the kept values" if packed else "as PEFT stores it"
    parser = Parser(prog=prog, description=f"Write an adapter {form}.")
    parser.add_argument("adapter", help="An adapter's directory, such as runs/quickstart/adapter.")
    parser.add_argument("output", help="A new directory for the adapter.")
    values = parser.parse_args(list(argv))
    guarded(lambda: repack(**values.as_dict(), packed=packed), prog)


def repack(adapter: str, output: str, packed: bool) -> None:
    """Write the adapter in the directory `adapter` to the new directory `output`, and print both sizes.

    Raises:
        InputError: `adapter` holds no adapter, or it has that form already, or `output` is not new.
    """
    from jaxpeft.interop.peft import weights
    from jaxpeft.report.console import log

    before, after = weights.repack(adapter, output, packed=packed)
    log(f"adapter in {output}: {before / 1e6:.3f} MB → {after / 1e6:.3f} MB")
    if packed:
        log(f"jaxpeft loads it as it is; python -m jaxpeft unpack {output} DIRECTORY writes PEFT's form again")
