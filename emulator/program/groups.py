"""The program's mesh on the machine: which devices a collective over some axes joins, and what it
costs them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.fabric import Collective, collective, network_of, together_s
from emulator.machines import Machine
from emulator.mesh import PodMesh, device_numbers
from emulator.timeline import CollectiveOp, Step

Timed = list[tuple[NDArray[np.int64], NDArray[np.float64]]]


class Groups:
    """Collectives over the axes of the one mesh that a program uses."""

    def __init__(self, on: Machine, meshes: Sequence[Any], algorithms: Mapping[str, Any]) -> None:
        self.on = on
        self.algorithms = algorithms
        self.meshes = _distinct(meshes)
        for mesh in self.meshes:
            check_fits(mesh, on)
        numbers = dict.fromkeys(d for mesh in self.meshes for d in device_numbers(mesh))
        self.devices: tuple[int, ...] = tuple(numbers) or (0,)
        self.mesh_shapes = tuple(_shape(mesh) for mesh in self.meshes)
        self.sizes = dict(pair for shape in self.mesh_shapes for pair in shape)
        self._place = {d: i for i, d in enumerate(self.devices)}
        self.assumptions: dict[str, None] = {}
        self._positions: dict[Any, list[NDArray[np.int64]]] = {}
        self._steps: dict[Any, list[CollectiveOp]] = {}
        self._classes: dict[int, tuple[list[int], NDArray[np.int64]]] = {}
        self._network = network_of(on)
        self._numbers = np.array(self.devices)

    @property
    def communicators(self) -> int:
        """How many different groups one device takes part in."""
        return sum(positions[0].shape[1] > 1 for positions in self._positions.values())

    def size_of(self, axes: Sequence[str]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def said(self, axes: Sequence[str]) -> str:
        """Axes as people read them, "dp+tp": all parts of an axis that the partitioner has cut, one
        after the other, are that axis.
        """
        words: list[str] = []
        rest = list(axes)
        while rest:
            axis = rest[0].removesuffix("/0")
            part = re.compile(rf"{re.escape(axis)}/\d+")
            parts = [name for name in self.sizes if part.fullmatch(name)]
            whole = axis != rest[0] and rest[: len(parts)] == parts
            words.append(axis if whole else rest[0])
            del rest[: len(parts) if whole else 1]
        return "+".join(words)

    def positions(self, axes: tuple[str, ...], parts: Any) -> list[NDArray[np.int64]]:
        """Mesh positions [group, rank] of a collective over `axes` (the first slowest), one array
        per group size.
        """
        key = (axes, None if parts is None else tuple(map(tuple, parts)))
        if key not in self._positions:
            table = self._table(axes)
            if parts is None:
                found = [table]
            else:
                by_size: dict[int, list[NDArray[np.int64]]] = {}
                for part in parts:
                    by_size.setdefault(len(part), []).append(table[:, list(part)])
                found = [np.concatenate(tables) for tables in by_size.values()]
            self._positions[key] = found
        return self._positions[key]

    def _table(self, axes: tuple[str, ...]) -> NDArray[np.int64]:
        """Positions [group, rank] in the mesh that has all of `axes`."""
        for mesh in self.meshes:
            names, sizes = zip(*_shape(mesh), strict=True)
            if set(axes) <= set(names):
                place = np.array([self._place[d] for d in device_numbers(mesh)]).reshape(sizes)
                order = [d for d, name in enumerate(names) if name not in axes]
                order += [names.index(a) for a in axes]
                return place.transpose(order).reshape(-1, self.size_of(axes))
        raise ValueError(f"no mesh of the program has the axes {axes}; it has {list(self.sizes)}")

    def steps(
        self,
        op: str,
        axes: tuple[str, ...],
        nbytes: int,
        dtype: str,
        *,
        name: str,
        where: str,
        parts: Any = None,
        perm: Any = None,
        source: int | None = None,
    ) -> list[Step]:
        """One collective in all groups, or nothing if it joins one device or no bytes."""
        perm = None if perm is None else tuple((int(a), int(b)) for a, b in perm)
        subsets = None if parts is None else tuple(map(tuple, parts))
        key = (op, axes, nbytes, dtype, name, where, perm, subsets, source)
        if key not in self._steps:
            self._steps[key] = self._build(
                op, axes, nbytes, dtype, name, where, parts, perm, source
            )
        return list(self._steps[key])

    def _build(
        self,
        op: str,
        axes: tuple[str, ...],
        nbytes: int,
        dtype: str,
        name: str,
        where: str,
        parts: Any,
        perm: Any,
        source: int | None,
    ) -> list[CollectiveOp]:
        if nbytes == 0 or perm == () or self.size_of(axes) == 1:
            return []
        groups: Timed = []
        links: dict[str, int] = {}
        bounds_s: list[NDArray[np.float64]] = []
        first: Any = None
        for positions in self.positions(axes, parts):
            classes, members = self._alike(positions)
            results = [
                self._collective(op, nbytes, positions[i], dtype, perm, source) for i in classes
            ]
            seconds = np.array([r.time_s for r in results])[members]
            groups.append((positions, seconds))
            bounds_s.append(np.array([r.bound_s for r in results])[members])
            for result, count in zip(results, np.bincount(members), strict=True):
                for tier, moved in dict(result.link_bytes).items():
                    links[tier] = links.get(tier, 0) + int(moved) * int(count)
            first = first or results[0]
            self.assumptions.update(dict.fromkeys(note for r in results for note in r.assumptions))
        if not self._network.spare and sum(len(positions) for positions, _ in groups) > 1:
            groups = self._sharing(op, nbytes, groups, dtype, perm, source)
        return [
            CollectiveOp(
                name=name,
                op=op,
                algorithm=str(first.algorithm),
                reason=str(first.reason),
                nbytes=nbytes,
                dtype=dtype,
                groups=tuple(groups),
                bounds_s=tuple(bounds_s),
                link_bytes=tuple(sorted(links.items())),
                axes=axes,
                where=where,
                detail=f"{first.algorithm}, {sum(len(p) for p, _ in groups)} groups of "
                f"{max(p.shape[1] for p, _ in groups)}",
                pairs=perm or (),
            )
        ]

    def _sharing(
        self, op: str, nbytes: int, groups: Timed, dtype: str, perm: Any, source: int | None
    ) -> Timed:
        """The groups' seconds when all of them use the links at once."""
        requests = [
            self._request(op, nbytes, row, dtype, perm, source)
            for positions, _ in groups
            for row in positions
        ]
        seconds = np.array(together_s(requests, self.on))
        ends = np.cumsum([len(positions) for positions, _ in groups])[:-1]
        parts = np.split(seconds, ends)
        return [(positions, part) for (positions, _), part in zip(groups, parts, strict=True)]

    def _alike(self, positions: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
        """Groups whose ranks lie on the machine in the same pattern cost the same: one of each, and
        who is which.
        """
        # `positions` are kept for good, so that their place in memory tells them apart.
        if id(positions) not in self._classes:
            self._classes[id(positions)] = self._classify(positions)
        return self._classes[id(positions)]

    def _classify(self, positions: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
        patterns: dict[bytes, int] = {}
        classes: list[int] = []
        members = np.empty(len(positions), np.int64)
        for i, row in enumerate(positions):
            pattern = self._network.pattern(self._numbers[row])
            if pattern not in patterns:
                patterns[pattern] = len(classes)
                classes.append(i)
            members[i] = patterns[pattern]
        return classes, members

    def _collective(
        self,
        op: str,
        nbytes: int,
        positions: NDArray[np.int64],
        dtype: str,
        perm: Any,
        source: int | None,
    ) -> Collective:
        return collective(on=self.on, **self._request(op, nbytes, positions, dtype, perm, source))

    def _request(
        self,
        op: str,
        nbytes: int,
        positions: NDArray[np.int64],
        dtype: str,
        perm: Any,
        source: int | None,
    ) -> dict[str, Any]:
        devices = tuple(self.devices[p] for p in positions)
        pairs = None if perm is None else [(devices[a], devices[b]) for a, b in perm]
        return {
            "op": op,
            "nbytes": nbytes,
            "devices": devices,
            "algorithm": self.algorithms.get(op),
            "dtype": dtype,
            "root": 0 if source is None else devices[source],
            "pairs": pairs,
        }


def _shape(mesh: Any) -> tuple[tuple[str, int], ...]:
    return tuple(mesh.shape.items())


def check_fits(mesh: Any, on: Machine) -> None:
    """Raises ValueError unless the machine has the mesh's devices."""
    shape = " x ".join(f"{name}={size}" for name, size in _shape(mesh))
    gone = set(on.faults.missing).intersection(device_numbers(mesh))
    if gone:
        raise ValueError(
            f"mesh {shape} uses devices {sorted(gone)[:5]}, which are missing from this "
            f"{on.name}; on.mesh(...) takes those that are there"
        )
    if mesh.size > on.num_devices:
        raise ValueError(
            f"mesh {shape} has {mesh.size} devices, but {on.name} has {on.num_devices} "
            f"({on.device_kind}s): make an axis smaller or choose another machine"
        )
    outside = [d for d in device_numbers(mesh) if d >= on.num_devices]
    if outside:
        raise ValueError(
            f"mesh {shape} uses devices {outside[:5]}, but {on.name} has devices "
            f"0..{on.num_devices - 1}"
        )


def _distinct(meshes: Sequence[Any]) -> list[Any]:
    """The program's meshes, once each. JAX copies meshes with other axis types and drops chosen
    device numbers then.
    """
    found: dict[tuple[tuple[str, int], ...], Any] = {}
    for mesh in meshes:
        old = found.setdefault(_shape(mesh), mesh)
        if isinstance(mesh, PodMesh):
            if isinstance(old, PodMesh) and old.device_numbers != mesh.device_numbers:
                raise NotImplementedError(
                    f"two meshes {dict(_shape(mesh))} over different devices in one program"
                )
            found[_shape(mesh)] = mesh
    names = [name for shape in found for name, _ in shape]
    shared = sorted({name for name in names if names.count(name) > 1})
    if shared:
        listed = "; ".join(" x ".join(f"{n}={s}" for n, s in shape) for shape in found)
        raise NotImplementedError(
            f"several meshes ({listed}) that share the axis names {', '.join(shared)} in one "
            "program: give their axes different names"
        )
    return list(found.values())
