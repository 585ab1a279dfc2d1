"""Windows over long rows of tokens."""

from __future__ import annotations

from jaxpeft.errors import InputError


def windows(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Cover `length` tokens by windows of at most `room` tokens.

        windows(10, 4, 2)  # [(0, 4), (2, 6), (4, 8), (6, 10)]
        windows(3, 4, 2)   # [(0, 3)]

    Args:
      length: the number of tokens, 0 or more.
      room: the most tokens of a window.
      stride: the tokens that two consecutive windows share.

    Returns:
      (start, stop) of each window, ascending. The last one ends at `length` and may be shorter than the others.

    Raises:
      InputError: there is no room for a token beside those that two windows share.
    """
    if not 0 <= stride < room:
        raise InputError(f"windows of {room} tokens cannot share {stride}; give a stride from 0 to {room - 1}")
    return [(start, min(start + room, length)) for start in range(0, max(length - stride, 1), room - stride)]
