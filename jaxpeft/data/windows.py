"""Windows over a long row: pieces that overlap, so that every token has context on both sides in one of them."""

from __future__ import annotations


def windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The windows over `length` tokens, as (start, stop) in ascending order. The last one ends at `length`.

    Args:
      length: number of tokens.
      room: most tokens of a window. All but the last one have so many.
      stride: tokens that consecutive windows share, from 0 to `room` - 1.
    """
    assert 0 <= stride < room, (stride, room)
    step = room - stride
    number = 1 + max(0, -(-(length - room) // step))
    return [(start, min(start + room, length)) for start in range(0, number * step, step)]
