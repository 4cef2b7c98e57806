"""Operations -> per-device clocks when collectives run beside independent kernels.

Every device has two engines, one for kernels and one for collectives. Each takes its steps in the
program's order; a step starts when its engine is free and what it reads is there. Kernels and
collectives take no bandwidth from each other, and buffers are never short: in the program's order
this is the most that overlap can give, not what a machine was seen to do. A compiler that starts
collectives earlier than the program does would hide more. A loop waits for both engines before each
trip.

No step starts later than it would without overlap, by induction over the program: engines are free
and values there no later than the one clock of `timeline.play` says. Nor does anything beat the
bound, which is the longest of the engines' own work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emulator.timeline import CollectiveOp, Loop, Needs, Op, Player, Span, Step, Timeline, meet


def play(
    steps: Sequence[Step],
    needs: Sequence[Needs],
    devices: Sequence[int],
    slowness: Sequence[float] | None = None,
) -> Timeline:
    """Runs `steps`, each with its entry of `needs`; otherwise as `timeline.play`."""
    return _TwoEngines(devices, slowness).play(steps, needs)


class _TwoEngines(Player):
    def run(
        self,
        steps: Sequence[Step],
        needs: Sequence[Needs],
        clocks: NDArray[np.int64],
        depth: int,
    ) -> NDArray[np.int64]:
        kernels = links = clocks
        ready: dict[int, NDArray[np.int64]] = {}
        for step, need in zip(steps, needs, strict=True):
            there = [ready[v] for v in need.reads if v in ready]
            slot = len(self.spans)
            if isinstance(step, Op):
                start = _latest(kernels, *there)
                end = kernels = start + self.kernel_ps(step)
            elif isinstance(step, CollectiveOp):
                start = _latest(links, *there)
                end = links = meet(step, start)
            else:
                assert isinstance(step, Loop)
                start = _latest(kernels, links, *there)
                end = kernels = links = self.loop(step, start, depth + 1)
            ready.update(dict.fromkeys(need.writes, end))
            if not self.quiet:
                self.spans.insert(slot, Span(step=step, depth=depth, start_ps=start, end_ps=end))
        return _latest(kernels, links)


def _latest(first: NDArray[np.int64], *others: NDArray[np.int64]) -> NDArray[np.int64]:
    for other in others:
        if other is not first:
            first = np.maximum(first, other)
    return first
