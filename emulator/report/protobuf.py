"""Just enough of Protocol Buffers' wire format to write messages: no dependency for one file type.

A field is a key (number x 8 + wire type) and a value: a varint (wire type 0), or a length and as
many bytes (2). A file of messages puts each one's length before it, as a varint.
Source: protobuf.dev, "Encoding" (documented).
"""

from __future__ import annotations

from collections.abc import Sequence


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    if value < 0:
        raise ValueError(f"a varint here must be at least 0; got {value}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    """A field of type int64, uint64, bool or enum."""
    return varint(number << 3) + varint(int(value))


def message(number: int, value: bytes) -> bytes:
    """A field that holds another message, or bytes."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def text(number: int, value: str) -> bytes:
    """A field of type string."""
    return message(number, value.encode())


def packed(number: int, values: Sequence[int]) -> bytes:
    """A repeated field of integers; nothing if there are none."""
    return message(number, b"".join(varint(v) for v in values)) if values else b""


def delimited(value: bytes) -> bytes:
    """A message as it stands in a file of several."""
    return varint(len(value)) + value
