"""Channel numbers of an HLO module, one for each collective.

JAX gives all collectives of a `shard_map` one channel, while what is known of their groups is kept
by channel here. So the serialised module (HloModuleProto) is written again with channels 1, 2, 3...
The fields' numbers are those of XLA's `hlo.proto` (documented).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

_COMPUTATIONS = 3  # of HloModuleProto
_INSTRUCTIONS = 2  # of HloComputationProto
_CHANNEL = 26  # of HloInstructionProto

_Rewrite = Callable[[bytes], bytes]


def with_own_channels(module: bytes) -> bytes:
    """A serialised HloModuleProto in which no two instructions share a channel."""
    fresh = itertools.count(1)

    def instruction(message: bytes) -> bytes:
        if not any(number == _CHANNEL for number, *_ in _fields(message)):
            return message
        kept = [message[a:b] for number, a, _, b in _fields(message) if number != _CHANNEL]
        return b"".join([*kept, _varint(_CHANNEL << 3), _varint(next(fresh))])

    return _each(module, _COMPUTATIONS, lambda c: _each(c, _INSTRUCTIONS, instruction))


def _each(message: bytes, field: int, rewrite: _Rewrite) -> bytes:
    """`message` with every message in one of its fields rewritten."""
    parts = []
    for number, start, value, end in _fields(message):
        if number == field:
            new = rewrite(message[value:end])
            parts += [_varint(number << 3 | 2), _varint(len(new)), new]
        else:
            parts.append(message[start:end])
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, where its key begins, where its value begins, where it ends) of every field."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read(message, at)
        kind = key & 7
        if kind == 2:
            length, value = _read(message, at)
            at = value + length
        else:
            value = at
            at = _read(message, at)[1] if kind == 0 else at + {1: 8, 5: 4}[kind]
        yield key >> 3, start, value, at


def _read(message: bytes, at: int) -> tuple[int, int]:
    """The varint at a place, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
