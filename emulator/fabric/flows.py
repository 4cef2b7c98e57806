"""Max-min fair sharing of links by what is active, event by event.

A flow is one slot on its way from one die to another, so the flows of a step are equally large.
Shared max-min fairly among themselves they end when the step's busiest link has done its work, not
later, whatever links each crosses: the busiest link gives its flows the least rate of all, and a
flow that ends never lowers the least rate. Hence a step by itself needs no events. (Were a flow
all that one die sends another, unequal ones could end later, and then another byte or a slower link
can end a step sooner: a neighbour that is held back makes room. Time shall not fall as bytes grow.)

What runs is a list of jobs, each a list of phases one after the other. A phase first waits a fixed
time, then works: alone, it takes `wire_s` and keeps link l busy for the part `busy[l]` of it. The
flows of one phase advance together (assumption), as none of them ends it but the last. Between jobs
the links are shared max-min fairly: all flows get the same rate, raised until a link is full; the
jobs that cross that link stay there, the others are raised further (progressive filling), up to the
rate that each has alone. Whenever a phase starts or ends its work, the rates are found anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FULL = 1e-12  # relative; rounding must not leave a link open that is full


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phase:
    """`repeat` alike steps of a job: `fixed_s` of waiting, then `wire_s` of work if alone.

    `links` are the numbers of the links it keeps busy and `busy` for which part of `wire_s` each;
    `bytes_per_s` is the rate of each of its flows when alone.
    """

    repeat: int
    fixed_s: float
    wire_s: float
    links: NDArray[np.int64]
    busy: NDArray[np.float64]
    bytes_per_s: float

    @property
    def alone_s(self) -> float:
        return self.repeat * (self.fixed_s + self.wire_s)


def fair_rates(usage: NDArray[np.float64], alone: NDArray[np.float64]) -> NDArray[np.float64]:
    """Max-min fair rates of members that would have the rates `alone` [member].

    `usage` [link, member] is the part of a link's capacity that a member takes at its rate alone.
    """
    part = np.zeros(len(alone))  # of the rate alone
    growing = np.ones(len(alone), bool)
    while growing.any():
        pace = np.where(growing, 1.0 / alone, 0.0)
        steps = (1.0 - part[growing]) * alone[growing]
        taken = usage @ part
        rising = usage @ pace
        links = rising > 0
        room = (1.0 - taken[links]) / rising[links]
        step = max(0.0, min(steps.min(), room.min(initial=np.inf)))
        part = np.minimum(part + step * pace, 1.0)
        full = usage @ part >= 1.0 - _FULL
        held = (usage[full] > 0).any(axis=0) | (part >= 1.0 - _FULL)
        if not (held & growing).any():  # rounding left a hair of room everywhere
            break
        growing &= ~held
    return part * alone


def contended(jobs: Sequence[Sequence[Phase]]) -> NDArray[np.int64]:
    """Links that could be asked for more than they carry if all jobs were at their worst at
    once.
    """
    links, asked = [], []
    for phases in jobs:
        if not phases:
            continue
        number = np.concatenate([phase.links for phase in phases])
        busy = np.concatenate([phase.busy for phase in phases])
        own, which = np.unique(number, return_inverse=True)
        worst = np.zeros(len(own))
        np.maximum.at(worst, which.reshape(-1), busy)
        links.append(own)
        asked.append(worst)
    if len(links) < 2:
        return np.zeros(0, np.int64)
    every, which = np.unique(np.concatenate(links), return_inverse=True)
    total = np.bincount(which.reshape(-1), weights=np.concatenate(asked))
    return every[total > 1.0 + _FULL]


def finish_s(jobs: Sequence[Sequence[Phase]]) -> list[float]:
    """Seconds until each of `jobs` ends when all start together."""
    scarce = contended(jobs)
    ends = [sum(phase.alone_s for phase in phases) for phases in jobs]
    sharing = [
        i for i, phases in enumerate(jobs) if any(np.isin(p.links, scarce).any() for p in phases)
    ]
    if len(sharing) < 2:
        return ends
    shared = _Shared([jobs[i] for i in sharing], scarce).play()
    for i, end in zip(sharing, shared, strict=True):
        ends[i] = max(ends[i], end)  # equal where nothing was shared, but for rounding
    return ends


class _Shared:
    """Jobs that may hinder one another, played to the end."""

    def __init__(self, jobs: Sequence[Sequence[Phase]], scarce: NDArray[np.int64]) -> None:
        self.jobs = jobs
        self.scarce = scarce
        self.rates: dict[tuple[tuple[int, int], ...], list[float]] = {}
        self.columns: dict[tuple[int, int], NDArray[np.float64]] = {}

    def play(self) -> list[float]:
        ends = [0.0] * len(self.jobs)
        at = {i: (0, 0) for i, phases in enumerate(self.jobs) if phases}  # phase, repetitions done
        waits = {i: self.jobs[i][0].fixed_s for i in at}
        left: dict[int, float] = {}  # seconds alone of the work that is going on
        now = 0.0
        while at:
            speeds = self._speeds(tuple((i, at[i][0]) for i in left))
            until = min(
                [*waits.values(), *(left[i] / s for i, s in zip(left, speeds, strict=True))]
            )
            now += until
            done = []
            for i, speed in zip(list(left), speeds, strict=True):
                work = self.jobs[i][at[i][0]].wire_s
                left[i] -= until * speed
                if left[i] <= _FULL * work:
                    done.append(i)
                    del left[i]
            for i in list(waits):
                waits[i] -= until
                if waits[i] <= 0.0:
                    del waits[i]
                    wire_s = self.jobs[i][at[i][0]].wire_s
                    if wire_s > 0:
                        left[i] = wire_s
                    else:
                        done.append(i)
            for i in done:
                phase, times = at[i]
                times += 1
                if times == self.jobs[i][phase].repeat:
                    phase, times = phase + 1, 0
                if phase == len(self.jobs[i]):
                    ends[i] = now
                    del at[i]
                else:
                    at[i] = (phase, times)
                    waits[i] = self.jobs[i][phase].fixed_s
            left = dict(sorted(left.items()))
        return ends

    def _speeds(self, working: tuple[tuple[int, int], ...]) -> list[float]:
        """Of each working job, its rate over its rate alone."""
        if working not in self.rates:
            if not working:
                return []
            usage = np.stack([self._column(*key) for key in working], axis=1)
            alone = np.array([self.jobs[i][phase].bytes_per_s for i, phase in working])
            self.rates[working] = (fair_rates(usage, alone) / alone).tolist()
        return self.rates[working]

    def _column(self, job: int, phase: int) -> NDArray[np.float64]:
        key = (job, phase)
        if key not in self.columns:
            step = self.jobs[job][phase]
            column = np.zeros(len(self.scarce))
            place = np.searchsorted(self.scarce, step.links)
            place = np.minimum(place, len(self.scarce) - 1)
            known = self.scarce[place] == step.links
            column[place[known]] = step.busy[known]
            self.columns[key] = column
        return self.columns[key]
