"""Find the encoding of a text file, and refuse a wrong one with the line that shows it."""

from __future__ import annotations

import codecs

from jaxpeft.errors import InputError

_BLOCK_SIZE = 1 << 20
_BYTE_ORDER_MARKS = {  # the four bytes of utf-32 begin with the two of utf-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def encoding_of(path: str, given: str | None) -> str:
    """The codec that opens the text file at `path`. The whole file is read once to check it, in constant memory.

    Without a `given` encoding the file is UTF-8, or what its byte order mark says.

    Raises:
      InputError: the encoding does not exist, the file has bytes that it does not allow, or the file is UTF-8 and another
        encoding is given, which would garble it.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    codec = _codec(path, given, start)
    unmarked = codec in ("utf-16", "utf-32") and not _mark(start)
    if unmarked or codec not in ("utf-8", *_BYTE_ORDER_MARKS.values()):
        _check_other(path, codec, str(given), start)
    if unmarked:
        raise InputError(
            f"{path}, line 1: no byte order mark of {codec}; set data.encoding to {codec}-le or {codec}-be, if it is one of them"
        )
    _check_bytes(path, codec, given)
    return codec


def _mark(start: bytes) -> str | None:
    return next((codec for mark, codec in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)


def _codec(path: str, given: str | None, start: bytes) -> str:
    marked = _mark(start)
    if given is None:
        if marked is None and start.count(0) > len(start) / 5:
            order = "le" if start[1::2].count(0) >= start[::2].count(0) else "be"
            raise InputError(
                f"{path}, line 1: not utf-8 but, as it seems, utf-16 without a byte order mark; give data.encoding utf-16-{order}"
            )
        return marked or "utf-8"
    try:
        "".encode(given)
        name = codecs.lookup(given).name
    except (LookupError, UnicodeError, ValueError) as error:
        raise InputError(
            f"data.encoding '{given}' is unknown; give one such as utf-8, latin-1, cp1252 or utf-16"
        ) from error
    if marked is None:
        return name
    if not name.startswith(marked.removesuffix("-sig")):
        raise InputError(
            f"{path}, line 1: it begins with the byte order mark of {marked.removesuffix('-sig')}, but data.encoding is {given}; "
            "leave data.encoding out"
        )
    return marked


def _check_bytes(path: str, codec: str, given: str | None) -> None:
    decoder = codecs.getincrementaldecoder(codec)()
    line = 1
    with open(path, "rb") as file:
        while True:
            block = file.read(_BLOCK_SIZE)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(error.encoding, "replace").count("\n")
                found = f"the byte 0x{error.object[error.start]:02x} is not {codec}"
                ways_out = "the file's encoding" if given else "the file's encoding, such as latin-1, cp1252 or utf-16"
                raise InputError(f"{path}, line {line}: {found}; set data.encoding to {ways_out}") from error
            if not block:
                return


def _check_other(path: str, codec: str, given: str, start: bytes) -> None:
    """Raise InputError if a file that is to be read as another `codec` is UTF-8, or plainly not UTF-16.

    Text of another encoding is hardly ever valid UTF-8.
    """
    is_wide = codec.startswith(("utf-16", "utf-32"))
    line, odd = 1, 1 if is_wide else None
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(_BLOCK_SIZE):
                text = decoder.decode(block)
                if "\0" in text:
                    return
                if odd is None and not text.isascii():
                    odd = line + text[: next(i for i, letter in enumerate(text) if not letter.isascii())].count("\n")
                line += text.count("\n")
        except UnicodeDecodeError as error:
            if is_wide and 0 not in start and sum(byte < 128 for byte in start) > 0.8 * len(start):
                raise InputError(
                    f"{path}, line 1: the text has single bytes for its letters, so it is not {given}; set data.encoding to the "
                    "file's encoding, such as latin-1 or cp1252"
                ) from error
            return
    if odd is not None:
        raise InputError(f"{path}, line {odd}: the text is utf-8, not {given}; leave data.encoding out")
