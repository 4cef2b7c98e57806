"""An exchange between all pairs on a user's own fabric, from sums instead of transfers.

The way from a to b takes one digit of the device number after the other, the innermost first (see
`level_network`). So along one dimension of a direct level, a line of devices carries what those
with its outer digits send, times what those with its inner digits are sent: the number of bytes
from place p to place q of the line is a product, and its links need no more than running sums.
Beneath a switch only what stays in one of its blocks takes the inner levels.
"""

from __future__ import annotations

import numpy as np

from emulator.fabric.network import Floats, Ints
from emulator.machines.level_wiring import LevelWires, Wires


def exchange_work(
    wires: Wires, senders: Ints, receivers: Ints, give: Floats, take: Floats, count: int
) -> Floats:
    """Bytes (of a slot) over each link if each of `senders` sends give x take slots to every other
    of `receivers`.
    """
    work = np.zeros(len(wires.capacity))
    sent = np.bincount(senders, weights=give, minlength=count)
    got = np.bincount(receivers, weights=take, minlength=count)
    scope = count  # who shares so much goes on inside
    for part in reversed(wires.levels):
        if part.level.kind == "switch":
            got = _through_switch(part, work, sent, got, scope)
            scope = part.inner
        else:
            _along_lines(part, work, sent, got, scope)
    return work


def _through_switch(
    part: LevelWires, work: Floats, sent: Floats, got: Floats, scope: int
) -> Floats:
    """Adds what crosses the switches of a level; returns what is got by those who do not."""
    planes, size, first = part.level.planes, part.level.size, part.first
    shape = (
        -1,
        scope // (part.inner * size),
        size,
        part.inner,
    )  # block, outer digits, place, inner
    out, into = sent.reshape(shape), got.reshape(shape).sum(axis=1, keepdims=True)
    leaving = out * (into.sum(axis=(2, 3), keepdims=True) - into.sum(axis=3, keepdims=True))
    entering = into * (out.sum(axis=(2, 3), keepdims=True) - out.sum(axis=3, keepdims=True))
    passing = (leaving.reshape(-1), entering.reshape(-1))
    for bytes_ in passing:
        work[first : first + len(bytes_) * planes] += np.repeat(bytes_ / planes, planes)
        first += len(bytes_) * planes
    for bytes_ in passing if part.uplinks.size else ():
        shared = bytes_.reshape(-1, part.inner).sum(axis=1)
        work[first : first + len(shared) * planes] += np.repeat(shared / planes, planes)
        first += len(shared) * planes
    return np.broadcast_to(into, out.shape).reshape(-1)


def _along_lines(part: LevelWires, work: Floats, sent: Floats, got: Floats, scope: int) -> None:
    kind, slots = part.level.kind, part.to.shape[1]
    table = work[part.first : part.first + part.to.size].reshape(*part.to.shape)
    stride = part.inner
    for d, size in enumerate(part.level.sizes):
        shape = (-1, scope // (stride * size), size, stride)  # block, outer digits, place, inner
        out = sent.reshape(shape).sum(axis=3)[..., None]  # [block, outer, place, 1]
        into = got.reshape(shape).sum(axis=1)[:, None]  # [block, 1, place, inner]
        if kind == "full_mesh":
            # [block, outer, from, inner, to]
            bytes_ = out[..., None] * np.moveaxis(into, 2, 3)[:, :, None]
            bytes_ = bytes_ * (np.arange(size)[:, None, None] != np.arange(size))
            table += bytes_.reshape(-1, slots)
        elif size > 1:
            line = _mesh_line if kind == "mesh" else _ring_line
            for way in range(2):
                table[:, 2 * d + way] += line(out, into, way).reshape(-1)
        stride *= size


def _mesh_line(out: Floats, into: Floats, way: int) -> Floats:
    """What leaves each place of a line upwards (way 0) or downwards."""
    if way:
        return _mesh_line(out[:, :, ::-1], into[:, :, ::-1], 0)[:, :, ::-1]
    below, upto = np.cumsum(out, axis=2), np.cumsum(into, axis=2)
    return below * (upto[:, :, -1:] - upto)


def _ring_line(out: Floats, into: Floats, way: int) -> Floats:
    """What leaves each place of a ring forwards (way 0) or backwards: all that has less than half
    the way round to go, and half of what has exactly that.
    """
    size = out.shape[2]
    if way:
        if size == 2:  # two devices have one link, not two
            return np.zeros(np.broadcast_shapes(out.shape, into.shape))
        return _ring_line(out[:, :, ::-1], into[:, :, ::-1], 0)[:, :, ::-1]
    if size == 2:
        return _within(out, into, 1)
    return (_within(out, into, size // 2) + _within(out, into, (size - 1) // 2)) / 2


def _within(out: Floats, into: Floats, reach: int) -> Floats:
    """What leaves each place i forwards if everybody sends as far as `reach` places: the sum over
    the senders j = i, i - 1, ... of out[j] times what lies beyond i, as far as j + reach.
    """
    size = out.shape[2]
    twice = np.concatenate([out, out], axis=2)  # places -size .. size - 1
    upto = np.cumsum(np.concatenate([into] * 3, axis=2), axis=2)  # places -size .. 2 size - 1
    reached = np.cumsum(twice * upto[:, :, reach : reach + 2 * size], axis=2)
    sending = np.cumsum(twice, axis=2)
    here, before = slice(size, 2 * size), slice(size - reach, 2 * size - reach)
    farther = reached[:, :, here] - reached[:, :, before]
    return farther - upto[:, :, here] * (sending[:, :, here] - sending[:, :, before])


def exchange_latency_s(wires: Wires, senders: Ints, receivers: Ints, count: int) -> float:
    """The longest way from one of `senders` to one of `receivers`, digit by digit: the greatest
    latency so far is kept for each mixture of the receiver's inner and the sender's outer digits.
    """
    longest = np.full(count, -np.inf)
    longest[senders] = 0.0
    for part in wires.levels:
        latency_s, stride = part.level.latency_s, part.inner
        if part.level.kind in ("full_mesh", "switch"):
            table = longest.reshape(-1, part.level.size, stride)  # outer digits, digit, inner
            away = table
            if part.level.kind == "switch":  # who crosses it does not go on inside
                away = np.where(table.max(axis=2, keepdims=True) > -np.inf, 0.0, -np.inf)
            longest = np.maximum(table, _of_others(away) + latency_s).reshape(-1)
            continue
        for size in part.level.sizes:
            table = longest.reshape(-1, size, stride)
            further = table.copy()
            for hops in range(1, size):
                if part.level.kind == "mesh":
                    up, down = table[:, :-hops] + hops * latency_s, table[:, hops:]
                    np.maximum(further[:, hops:], up, out=further[:, hops:])
                    down = down + hops * latency_s
                    np.maximum(further[:, :-hops], down, out=further[:, :-hops])
                else:
                    near = min(hops, size - hops) * latency_s
                    np.maximum(further, np.roll(table, hops, axis=1) + near, out=further)
            longest = further.reshape(-1)
            stride *= size
    return float(longest[receivers].max())


def _of_others(table: Floats) -> Floats:
    """Along axis 1, the largest of all values but the own."""
    if table.shape[1] == 1:
        return np.full_like(table, -np.inf)
    first = table.argmax(axis=1, keepdims=True)
    largest = np.take_along_axis(table, first, axis=1)
    rest = table.copy()
    np.put_along_axis(rest, first, -np.inf, axis=1)
    own = np.arange(table.shape[1])[None, :, None] == first
    return np.where(own, rest.max(axis=1, keepdims=True), largest)
