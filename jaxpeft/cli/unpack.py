"""`jaxpeft unpack`: a packed adapter in PEFT's form again."""

from __future__ import annotations

from functools import partial

from jaxpeft.cli import pack

main = partial(pack.main, packed=False)
"""Parse the arguments and write the adapter in PEFT's form."""
