"""The values reading: evaluates a traced program for all devices at once, matmuls and collectives
replaced.

Every equation is evaluated on `Folded` arrays (see `folded.py`). Matmuls go to
`kernels.dot_general`, collectives to `collective_rules`, element-wise work and floating reductions
to `vector`; control flow is entered here, so that its predicates are decided for all devices
together; everything else runs under a `vmap` of that one equation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

import kernels
from emulator.machines import Machine
from emulator.mesh import device_numbers, entries
from emulator.program import (
    collective_rules,
    matmul_rules,
    ragged_exchange,
    ragged_rules,
    vector,
)
from emulator.program.axes import infer_axes, left_empty
from emulator.program.calls import call_body, is_call, platform_branch
from emulator.program.collective_rules import groups_differ
from emulator.program.folded import Folded, FoldedMesh, merge_dims, split_dims, spread, union_axes
from emulator.program.groups import check_fits
from emulator.program.host_calls import host_call
from emulator.program.outside import of_the_host
from emulator.program.primitives import (
    HOST,
    IDENTITIES,
    LINEAR_ALGEBRA,
    OWN,
    PER_DEVICE,
    REFUSED,
)
from emulator.program.real_devices import any_of, gather, over, own_part
from emulator.program.sites import sites, width
from emulator.program.trace import (
    is_dynamic,
    is_emulated,
    open_jaxpr,
    scan_counts,
    sub_jaxprs,
    walk,
)
from emulator.program.turns import parts_of, turns

Counts = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a program is evaluated with. Hashable: it is part of the key under which compiled
    programs are kept.

    `arithmetic` is None when matmuls are left to XLA ("native"). `tiling` is None, "library" or a
    Tiling: in which order matmuls sum K. `algorithms` are (operation, name
    or callable) pairs; operations not named get the machine's choice. `exact_vector` keeps element-
    wise bits independent of batching and fusion. `counting` also returns trip counts and branches
    taken. `devices` are the real ones that the mesh is divided over, None for JAX's default.
    """

    machine: Machine
    arithmetic: kernels.Arithmetic | None
    tiling: kernels.Tiling | str | None = None
    algorithms: tuple[tuple[str, Any], ...] = ()
    exact_vector: bool = True
    counting: bool = False
    devices: tuple[jax.Device, ...] | None = None

    def __hash__(self) -> int:
        # Equal settings agree on these; the program, which stands beside them in every key, tells
        # more, and hashing every parameter of an arithmetic would cost more than the answer.
        return hash((self.exact_vector, self.counting))


@dataclasses.dataclass(kw_only=True, slots=True)
class Evaluator:
    """Evaluates jaxprs under one mesh; `counts` collects what the current body measured. `here`
    are the devices that have come to it, where loops or branches differ between them; the others
    are evaluated along, and call nobody.
    """

    settings: Settings
    mesh: FoldedMesh = FoldedMesh()
    counts: Counts = dataclasses.field(default_factory=dict)
    here: Folded | None = None

    def jaxpr(self, jaxpr: Any, args: Sequence[Folded], path: str) -> list[Folded]:
        """The outputs of a closed (or constant-free) jaxpr; `path` as in `trace`."""
        consts = getattr(jaxpr, "consts", None) or []
        body = open_jaxpr(jaxpr)
        env: dict[Any, Folded] = {}
        for var, const in zip(body.constvars, map(of_the_host, consts), strict=True):
            env[var] = Folded(const, known=not isinstance(const, jax.core.Tracer))
        env.update(zip(body.invars, args, strict=True))

        def read(atom: Any) -> Folded:
            # A literal's own type carries the mesh it was traced under; its value does not.
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return Folded(np.asarray(atom.val, aval.dtype), known=True)
            return env[atom]

        live = _live_equations(body)
        for i, eqn in enumerate(body.eqns):
            if i not in live:
                continue
            values = [read(v) for v in eqn.invars]
            outs = self.equation(eqn, values, f"{path}/{i}")
            if all(v.known for v in values):
                outs = [dataclasses.replace(out, known=True) for out in outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in body.outvars]

    def equation(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        name = eqn.primitive.name
        if is_emulated(eqn):  # already, perhaps on another machine
            return self.each_device(eqn, values)
        if is_call(eqn):
            return self.call(eqn, values, path)
        if name in RULES:
            return RULES[name](self, eqn, values, path)
        collective_rules.check_axes(self.mesh, eqn)
        if name == "axis_index":
            return [collective_rules.axis_index(self.mesh, eqn)]
        if name in collective_rules.RULES:
            rule = collective_rules.collective_values
            return [rule(self.settings, self.mesh, eqn, v) for v in values]
        if name in IDENTITIES:
            return list(values)
        if name in HOST:
            return host_call(_binder(eqn), eqn, values, self.mesh, self.here)
        if name in vector.ELEMENTWISE:
            return [
                vector.elementwise(_binder(eqn), eqn, values, self.mesh, self.settings.exact_vector)
            ]
        if name in ("reduce_sum", "reduce_prod") and self._own_order(values[0]):
            return [vector.reduce_tree(values[0], eqn.params["axes"], name)]
        if name in PER_DEVICE or name in LINEAR_ALGEBRA or name in OWN:
            return self.each_device(eqn, values)
        reason = REFUSED.get(name, "nothing here knows what it does")
        raise NotImplementedError(f"primitive {name!r} is not modelled: {reason}")

    def each_device(self, eqn: Any, values: list[Folded]) -> list[Folded]:
        """Any other primitive: the equation on every device's local arrays."""
        bind = _binder(eqn)
        if _one_by_one(eqn, values) and (axes := union_axes(self.mesh, values)):
            sizes = self.mesh.shape(axes)
            everywhere = [spread(v, axes, self.mesh).array for v in values]
            flat = tuple(a.reshape(math.prod(sizes), *a.shape[len(axes) :]) for a in everywhere)
            mapped = lax.map(lambda arrays: bind(*arrays), flat)
            result = jax.tree.map(lambda r: r.reshape(*sizes, *r.shape[1:]), mapped)
        else:
            result, axes = vector.vmapped(bind, values, self.mesh)
        results = result if eqn.primitive.multiple_results else [result]
        return [Folded(r, axes) for r in results]

    def _own_order(self, value: Folded) -> bool:
        return self.settings.exact_vector and jnp.issubdtype(
            jnp.result_type(value.array), jnp.floating
        )

    # Bodies that are simply entered.

    def call(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        entered = call_body(eqn)
        assert entered is not None  # asked by `is_call`
        body, operands = entered
        return self.jaxpr(body, [values[i] for i in operands], path)

    def shard_map(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        params = eqn.params
        mesh = _folded_mesh(params["mesh"], self.settings.machine, self.mesh)
        mesh = dataclasses.replace(
            mesh, manual=mesh.ordered({*self.mesh.manual, *params["newly_manual_axes"]})
        )
        devices = self.settings.devices
        if devices is None or self.mesh.names:
            inner = dataclasses.replace(self, mesh=mesh)  # counts go into the same dict
            return inner.shard_mapped(params, values, path, outside=self.mesh)

        def on_one(mesh: FoldedMesh, *arrays: Array) -> Any:
            frame = dataclasses.replace(self, mesh=mesh, counts={})
            whole = [Folded(a, known=v.known) for a, v in zip(arrays, values, strict=True)]
            outs = frame.shard_mapped(params, whole, path, outside=self.mesh)
            return [jnp.asarray(v.array) for v in outs], frame.counts

        arrays = [jnp.asarray(v.array) for v in values]
        outs, counts = over(devices, mesh, on_one, arrays)
        for site, count in counts.items():
            self._count(site, count)
        return list(map(Folded, outs))

    def shard_mapped(
        self, params: Any, values: list[Folded], path: str, outside: FoldedMesh
    ) -> list[Folded]:
        """The body of a `shard_map` that divides values from `outside` over this mesh's axes."""
        entered = []
        for v, s in zip(values, params["in_specs"], strict=True):
            spec = _spec(s, len(v.local_shape), "in_specs")
            named = [name for names in spec for name in names]
            divided = split_dims(v, spec, self.mesh.whole(named))
            part = own_part(divided, named, self.mesh)
            entered.append(dataclasses.replace(part, known=v.known))
        outs = self.in_turns(params["jaxpr"], entered, path, nested=bool(outside.names))
        leaving = tuple(a for a in self.mesh.manual if a not in outside.manual)
        left = []
        for out, (v, s) in enumerate(zip(outs, params["out_specs"], strict=True)):
            spec = _spec(s, len(v.local_shape), "out_specs")
            named = [name for names in spec for name in names]
            if params["check_vma"] and not {*v.axes} & {*leaving} <= {*named}:
                self._check_choices(params["jaxpr"], entered, out, {*leaving} - {*named})
            gone = [*leaving, *named]
            gathered = gather(v, gone, self.mesh)
            left.append(merge_dims(gathered, spec, leaving, self.mesh.whole(gone)))
        return left

    def in_turns(self, body: Any, entered: list[Folded], path: str, nested: bool) -> list[Folded]:
        """The body of a `shard_map`, parts of the first manual axis perhaps one after the other."""
        count = 1 if nested else turns(self.settings, self.mesh, body, entered)
        if count == 1:
            return self.jaxpr(body, entered, path)
        axis = self.mesh.manual[0]  # so the first of a value's axes, if it is one
        frame = dataclasses.replace(self, mesh=self.mesh.first_part(axis, count))
        out_axes: list[tuple[str, ...]] = []
        parts = [parts_of(v.array, count) if axis in v.axes else None for v in entered]

        def turn(index: Array) -> list[Array]:
            values = [
                Folded(part(index), v.axes, known=v.known) if part else v
                for part, v in zip(parts, entered, strict=True)
            ]
            outs = frame.jaxpr(body, values, path)
            out_axes[:] = [v.axes for v in outs]
            return [jnp.asarray(v.array) for v in outs]

        made = lax.map(turn, jnp.arange(count))
        return [
            Folded(array.reshape(-1, *array.shape[2:]) if axis in axes else array[0], axes)
            for array, axes in zip(made, out_axes, strict=True)
        ]

    def _check_choices(
        self, body: Any, entered: Sequence[Folded], out: int, axes: set[str]
    ) -> None:
        """Raises where a result of a `shard_map` that is taken to be the same along `axes` is not,
        because devices take different branches: JAX's types do not say so, and what they keep for
        derivatives would be one device's for all.
        """
        varying = [
            infer_axes(self.mesh, body, [v.axes for v in entered], lambda *_: False, choices)[out]
            for choices in (True, False)
        ]
        if chosen := axes.intersection(varying[0]) - {*varying[1]}:
            raise NotImplementedError(
                f"a 'cond' whose predicate differs over mesh axes {tuple(sorted(chosen))} gives a "
                "value that leaves its shard_map, as a result or for a derivative, as one that is "
                "the same along them, which JAX's types let pass; make what its branches choose "
                "from, predicates of conds inside them among it, varying with lax.pcast"
            )

    # Control flow. Carried values get the mesh axes that any iteration gives them.

    def scan(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        params = eqn.params
        n_consts, n_carry = scan_counts(params)
        consts, carry, xs = (
            values[:n_consts],
            values[n_consts : n_consts + n_carry],
            values[n_consts + n_carry :],
        )
        fixed = [v.axes for v in consts], [v.axes for v in xs]
        carry_axes = self._carry_axes(
            [v.axes for v in carry],
            lambda axes: self._infer(params["jaxpr"], [*fixed[0], *axes, *fixed[1]])[:n_carry],
        )
        out_axes: list[tuple[str, ...]] = []

        def body(carried: list[Array], x: list[Array]) -> Any:
            frame = self._frame()
            args = [*consts, *map(Folded, carried, carry_axes), *map(Folded, x, fixed[1])]
            outs = frame.jaxpr(params["jaxpr"], args, path)
            out_axes[:] = [v.axes for v in outs[n_carry:]]
            new = [
                spread(v, axes, self.mesh).array for v, axes in zip(outs, carry_axes, strict=False)
            ]
            return new, ([v.array for v in outs[n_carry:]], frame.counts)

        init = [spread(v, axes, self.mesh).array for v, axes in zip(carry, carry_axes, strict=True)]
        rows = [_move_axis(v.array, len(v.axes), 0) for v in xs]
        final, (ys, counts) = lax.scan(
            body, init, rows, length=params["length"], reverse=params["reverse"]
        )
        for site, count in counts.items():
            self._count(site, count.sum(0))
        stacked = [
            Folded(_move_axis(y, 0, len(axes)), axes) for y, axes in zip(ys, out_axes, strict=True)
        ]
        return [*map(Folded, final, carry_axes), *stacked]

    def while_loop(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts, carry = (
            values[:n_cond],
            values[n_cond : n_cond + n_body],
            values[n_cond + n_body :],
        )
        test, body_jaxpr = params["cond_jaxpr"], params["body_jaxpr"]

        def predicate_axes(axes: list[tuple[str, ...]]) -> tuple[str, ...]:
            return self._infer(test, [*(v.axes for v in cond_consts), *axes])[0]

        def step(axes: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
            new = self._infer(body_jaxpr, [*(v.axes for v in body_consts), *axes])
            extra = predicate_axes(axes)
            return [self.mesh.ordered({*a, *extra}) for a in new]

        carry_axes = self._carry_axes([v.axes for v in carry], step)
        divergent = predicate_axes(carry_axes)
        if divergent:
            for part in (test, body_jaxpr):
                _refuse_divergent_collectives("while", divergent, part)

        # Under a `vmap` the predicate is an array, and each of its elements a loop of its own.
        holds: Any = open_jaxpr(test).outvars[0].aval
        each = tuple(range(len(holds.shape)))

        def predicate(frame: Evaluator, carried: Sequence[Array]) -> Array:
            (out,) = frame.jaxpr(
                test, [*cond_consts, *map(Folded, carried, carry_axes)], path + ".cond"
            )
            return spread(out, divergent, self.mesh).array & arrived

        # Devices that have not come here need not end it: what they hold is thrown away.
        arrived = jnp.expand_dims(self._arrived(divergent), tuple(len(divergent) + i for i in each))

        def body(state: Any) -> Any:
            carried, trips, counts, active = state
            frame = self._frame()
            if divergent:
                some = active.any(tuple(len(divergent) + i for i in each))
                frame.here = self._of(Folded(some, divergent))
            outs = frame.jaxpr(
                body_jaxpr, [*body_consts, *map(Folded, carried, carry_axes)], path + ".body"
            )
            new = [
                spread(v, axes, self.mesh).array for v, axes in zip(outs, carry_axes, strict=True)
            ]
            if divergent or each:  # devices (or elements) that have left it keep their values
                new = [
                    self._where(active, divergent, n, o, a)
                    for n, o, a in zip(new, carried, carry_axes, strict=True)
                ]
            active = predicate(frame, new) & active
            return new, trips + 1, _added(counts, frame.counts), active

        init = [spread(v, axes, self.mesh).array for v, axes in zip(carry, carry_axes, strict=True)]
        first = self._frame()
        active = predicate(first, init)
        counts = _added(self._zero_counts(eqn, path), first.counts)
        final, trips, counts, _ = lax.while_loop(
            lambda state: any_of(self.mesh, state[3]), body, (init, jnp.int32(0), counts, active)
        )
        self._count(path, jnp.stack([self._arrived(()).astype(jnp.int32), trips]))
        for site, count in counts.items():
            self._count(site, count)
        return list(map(Folded, final, carry_axes))

    def cond(self, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
        branches = eqn.params["branches"]
        index, operands = values[0], values[1:]
        arg_axes = [v.axes for v in operands]
        outs_of = [self._infer(b, arg_axes) for b in branches]
        joined = [
            self.mesh.ordered({a for axes in column for a in axes})
            for column in zip(*outs_of, strict=True)
        ]
        n = len(branches)
        if (
            index.axes
        ):  # devices take different branches: all are evaluated, each device keeps its own
            for branch in branches:
                _refuse_divergent_collectives("cond", index.axes, branch)
            which = jnp.clip(index.array.astype(jnp.int32), 0, n - 1)
            results = []
            for i, branch in enumerate(branches):
                here = self._of(Folded(which == i, index.axes))
                frame = dataclasses.replace(self, here=here)  # counts go into the same dict
                results.append(frame.jaxpr(branch, operands, f"{path}.{i}"))
            self._count_taken(path, Folded(which, index.axes), n)
            empty = zip(*map(left_empty, branches), strict=True)
            return [
                self._choose(which, index.axes, list(column), out)
                for column, out in zip(zip(*results, strict=True), empty, strict=True)
            ]

        zeros = self._zero_counts(eqn, path)

        def run(i: int) -> Callable[..., Any]:
            def branch(*arrays: Array) -> Any:
                frame = self._frame()
                given = [
                    Folded(array, v.axes, known=v.known)
                    for array, v in zip(arrays, operands, strict=True)
                ]
                outs = frame.jaxpr(branches[i], given, f"{path}.{i}")
                arrays_out = [
                    spread(v, axes, self.mesh).array for v, axes in zip(outs, joined, strict=True)
                ]
                return arrays_out, _added(zeros, frame.counts)

            return branch

        which = jnp.clip(jnp.asarray(index.array).astype(jnp.int32), 0, n - 1)
        arrays, counts = lax.switch(which, [run(i) for i in range(n)], *(v.array for v in operands))
        self._count_taken(path, Folded(which), n)
        for site, count in counts.items():
            self._count(site, count)
        return list(map(Folded, arrays, joined))

    def _infer(self, jaxpr: Any, in_axes: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        settings = self.settings
        return infer_axes(self.mesh, jaxpr, in_axes, functools.partial(groups_differ, settings))

    def _carry_axes(
        self, axes: list[tuple[str, ...]], step: Callable[..., Any]
    ) -> list[tuple[str, ...]]:
        """The least axes that contain `axes` and stay the same under `step`."""
        while True:
            new = [self.mesh.ordered({*a, *b}) for a, b in zip(axes, step(axes), strict=True)]
            if new == axes:
                return axes
            axes = new

    def _where(
        self, mask: Array, mask_axes: tuple[str, ...], new: Array, old: Array, axes: tuple[str, ...]
    ) -> Array:
        """`new` or `old` by a mask over mesh axes and over the first of the local dimensions."""
        if jnp.issubdtype(new.dtype, jax.dtypes.extended):
            new_data, old_data = jax.random.key_data(new), jax.random.key_data(old)
            picked = self._where(mask, mask_axes, new_data, old_data, axes)
            return jax.random.wrap_key_data(picked, impl=jax.random.key_impl(new))
        dims = [axes.index(a) for a in mask_axes]
        dims += [len(axes) + i for i in range(mask.ndim - len(mask_axes))]
        return lax.select(lax.broadcast_in_dim(mask, new.shape, dims), new, old)

    def _choose(
        self, which: Array, axes: tuple[str, ...], column: list[Folded], empty: Sequence[bool]
    ) -> Folded:
        """The result of each device's own branch; one that is `empty` may be any other branch's:
        JAX says of what only one branch makes that it is the same on all devices, if it is there.
        """
        made = [i for i, nothing in enumerate(empty) if not nothing] or [0]
        if len(made) == 1:
            return column[made[0]]
        everywhere = self.mesh.ordered({*axes, *(a for i in made for a in column[i].axes)})
        picked = spread(column[made[0]], everywhere, self.mesh).array
        for i in made[1:]:
            array = spread(column[i], everywhere, self.mesh).array
            picked = self._where(which == i, axes, array, picked, everywhere)
        return Folded(picked, everywhere)

    def _of(self, chosen: Folded) -> Folded:
        """Those of the devices that are here which are `chosen`."""
        if self.here is None:
            return chosen
        axes = union_axes(self.mesh, [self.here, chosen])
        both = [spread(v, axes, self.mesh).array for v in (self.here, chosen)]
        return Folded(both[0] & both[1], axes)

    def _arrived(self, axes: tuple[str, ...]) -> Array:
        """Whether any device at each index of mesh `axes` is here, [*sizes of axes]."""
        if self.here is None:
            return jnp.ones(self.mesh.shape(axes), jnp.bool_)
        others = [a for a in self.here.axes if a not in axes]
        every = gather(self.here, others, self.mesh)
        kept = tuple(a for a in every.axes if a in axes)
        some = every.array.any(tuple(every.axes.index(a) for a in others))
        return spread(Folded(some, kept), axes, self.mesh).array

    def _count_taken(self, path: str, which: Folded, n: int) -> None:
        """Counts which of `n` branches each device of the mesh takes, [devices x n]; those that are
        not here take none.
        """
        if not self.settings.counting:
            return
        chosen = Folded(jnp.asarray(which.array)[..., None] == jnp.arange(n), which.axes)
        if self.here is not None:
            axes = union_axes(self.mesh, [chosen, self.here])
            here = spread(self.here, axes, self.mesh).array[..., None]
            chosen = Folded(spread(chosen, axes, self.mesh).array & here, axes)
        every, whole = gather(chosen, self.mesh.names, self.mesh), self.mesh.whole(self.mesh.names)
        table = spread(every, self.mesh.names, whole).array
        self._count(path, table.astype(jnp.int32).reshape(-1))

    def _frame(self) -> Evaluator:
        return dataclasses.replace(self, counts={})

    def _count(self, site: str, count: Array) -> None:
        if self.settings.counting:
            self.counts[site] = self.counts[site] + count if site in self.counts else count

    def measure(self, path: str, what: Callable[[], Array]) -> None:
        """Counts one execution of the site at `path`, and what it adds."""
        if self.settings.counting:
            self._count(path, jnp.concatenate([jnp.ones(1, jnp.int32), what().reshape(-1)]))

    def _zero_counts(self, eqn: Any, path: str) -> Counts:
        """A zero for every site inside the bodies of an equation."""
        if not self.settings.counting:
            return {}
        return {
            site: jnp.zeros(width(inner, mesh), jnp.int32)
            for label, body in sub_jaxprs(eqn)
            for site, inner, mesh in sites(body, path + label, self.mesh)
        }


def _dot_general(self: Evaluator, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
    if self.settings.arithmetic is None:
        return self.each_device(eqn, values)
    lhs, rhs = values
    if self.settings.tiling is not None:
        return [matmul_rules.tiled_dot_general(eqn, lhs, rhs, self.mesh, self.settings)]
    return [matmul_rules.dot_general(eqn, lhs, rhs, self.mesh, self.settings.arithmetic)]


def _conv_general_dilated(
    self: Evaluator, eqn: Any, values: list[Folded], path: str
) -> list[Folded]:
    if self.settings.arithmetic is None:
        return self.each_device(eqn, values)
    lhs, rhs = values
    return [matmul_rules.conv_general_dilated(eqn, lhs, rhs, self.mesh, self.settings.arithmetic)]


def _ragged_dot_general(self: Evaluator, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
    if is_dynamic(eqn):
        self.measure(path, lambda: ragged_rules.rows_of_groups(values, self.mesh))
    if self.settings.arithmetic is None:
        return self.each_device(eqn, values)
    return [ragged_rules.ragged_dot_general(eqn, values, self.mesh, self.settings.arithmetic)]


def _ragged_all_to_all(self: Evaluator, eqn: Any, values: list[Folded], path: str) -> list[Folded]:
    self.measure(path, lambda: ragged_exchange.sent(eqn, values, self.mesh))
    return [ragged_exchange.ragged_all_to_all(eqn, values, self.mesh)]


_Rule = Callable[[Evaluator, Any, list[Folded], str], list[Folded]]
RULES: Mapping[str, _Rule] = {
    "shard_map": Evaluator.shard_map,
    "scan": Evaluator.scan,
    "while": Evaluator.while_loop,
    "cond": Evaluator.cond,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "ragged_dot_general": _ragged_dot_general,
    "ragged_all_to_all": _ragged_all_to_all,
    "dce_sink": lambda self, eqn, values, path: [],
    "platform_index": lambda self, eqn, values, path: [
        Folded(np.int32(platform_branch(eqn.params["platforms"])))
    ],
}


def _added(counts: Counts, more: Counts) -> Counts:
    return {site: count + more.get(site, 0) for site, count in counts.items()}


def _live_equations(jaxpr: core.Jaxpr) -> set[int]:
    """Indices of the equations whose results are used, or that have effects."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    live = set()
    for i in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[i]
        if eqn.effects or any(v in needed for v in eqn.outvars):
            live.add(i)
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return live


def _binder(eqn: Any) -> Callable[..., Any]:
    """Binds the equation's primitive; shardings refer to the traced mesh and are dropped."""
    params = {k: None if k in ("sharding", "out_sharding") else v for k, v in eqn.params.items()}
    params = eqn.primitive.get_bind_params(params)
    if not eqn.primitive.name.startswith("random_"):
        return lambda *arrays: eqn.primitive.bind(*arrays, **params)

    def drawn(*arrays: Any) -> Any:  # in the manner that held where the program was traced
        with jax.threefry_partitionable(eqn.ctx.threefry_partitionable):
            return eqn.primitive.bind(*arrays, **params)

    return drawn


def _one_by_one(eqn: Any, values: Sequence[Folded]) -> bool:
    """Whether `vmap` has no rule for an equation (or not for all its forms), or gives `rbg` keys
    other values.
    """
    if eqn.primitive.name in ("reduce", "reduce_window"):  # none for initial values that differ
        return any(v.axes for v in values[len(values) // 2 :])
    if eqn.primitive.name in ("rng_bit_generator", "cholesky_update", "ragged_dot_general"):
        return True
    impl = str(eqn.params.get("impl", "")) + "".join(
        str(v.aval.dtype) for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key)
    )
    return eqn.primitive.name.startswith("random_") and "rbg" in impl


def _folded_mesh(mesh: Any, machine: Machine, outer: FoldedMesh) -> FoldedMesh:
    if outer.names:
        return outer  # a nested shard_map names axes of the same mesh
    check_fits(mesh, machine)
    numbers = device_numbers(mesh)
    return FoldedMesh(
        names=tuple(mesh.axis_names), sizes=tuple(mesh.axis_sizes), devices=tuple(numbers)
    )


def _spec(spec: Any, rank: int, what: str) -> list[tuple[str, ...]]:
    """A PartitionSpec as one tuple of mesh axes per dim."""
    if getattr(spec, "unreduced", None):
        raise NotImplementedError(
            f"{what} with unreduced axes {sorted(spec.unreduced)} are not modelled"
        )
    known = entries(spec)
    return [*known, *[()] * (rank - len(known))]


def _refuse_divergent_collectives(kind: str, axes: tuple[str, ...], body: Any) -> None:
    for _, eqn in walk(body):
        used = collective_rules.collective_axes(eqn)
        if eqn.primitive.name != "axis_index" and set(used) & set(axes):
            raise NotImplementedError(
                f"a {kind!r} whose predicate differs over mesh axes {axes} contains the collective "
                f"{eqn.primitive.name!r} over {used}: devices would wait for each other for "
                "ever; make the predicate the same on all of them (a psum or pmax of it, say)"
            )


def _move_axis(array: Array, source: int, destination: int) -> Array:
    return array if source == destination else jnp.moveaxis(array, source, destination)
