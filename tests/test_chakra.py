"""Chakra traces: decoded again, byte for byte, by the rules of the wire format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import emulator as em
from emulator.report import chakra, protobuf
from emulator.timeline import Loop, Op

POD = em.cloudmatrix384()


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, integer or bytes) of one message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        assert key & 7 == 2, key
        length = varint()
        yield key >> 3, data[at : at + length]
        at += length
    assert at == len(data)


def messages(data: bytes) -> list[bytes]:
    """The messages of a file, which look like fields without a key."""
    found = []
    while data:
        length = shift = used = 0
        while True:
            byte = data[used]
            length |= (byte & 0x7F) << shift
            shift, used = shift + 7, used + 1
            if byte < 0x80:
                break
        found.append(data[used : used + length])
        assert len(found[-1]) == length
        data = data[used + length :]
    return found


NAMES = {1: "id", 2: "name", 3: "type", 5: "data_deps", 7: "duration_micros"}
VALUES = {9: int, 13: int, 27: bool, 29: bytes.decode}  # int64, uint64, bool, string


def attribute(data: bytes) -> tuple[str, Any]:
    (_, name), (field, value) = fields(data)
    return name.decode(), VALUES[field](value)


def node(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"data_deps": []}
    for field, value in fields(data):
        if field == 10:
            name, content = attribute(value)
            found[name] = content
        elif field == 5:
            found["data_deps"] = [v for _, v in fields(b"".join(_keyed(value)))]
        else:
            found[NAMES[field]] = value.decode() if field == 2 else value
    return found


def _keyed(data: bytes) -> Iterator[bytes]:
    """Packed varints, each with a key before it."""
    start = 0
    for end, byte in enumerate(data, start=1):
        if byte < 0x80:
            yield b"\x08" + data[start:end]
            start = end


def traces(folder: Path, name: str, ranks: int) -> list[list[dict[str, Any]]]:
    found = []
    for rank in range(ranks):
        first, *rest = messages((folder / f"{name}.{rank}.et").read_bytes())
        version, *_ = (value for field, value in fields(first) if field == 1)
        assert version == b"0.0.4"
        found.append([node(data) for data in rest])
    return found


def program():  # noqa: ANN201
    mesh = POD.mesh(dp=3, tp=4)

    def step(x, w):  # noqa: ANN001, ANN202
        def layer(_, y):  # noqa: ANN001, ANN202
            y = jax.lax.psum(jnp.tanh(y @ w), "tp")
            return jax.lax.ppermute(y, "dp", [(0, 1), (1, 2), (2, 0)])

        y = jax.lax.fori_loop(0, 3, layer, x)
        y = jax.lax.all_gather(y, "tp", tiled=True)
        return jax.lax.psum_scatter(y, "tp", tiled=True)

    specs = {"in_specs": (P("dp"), P()), "out_specs": P("dp"), "check_vma": False}
    return jax.shard_map(step, mesh=mesh, **specs)


@pytest.fixture(scope="module")
def answer() -> em.Estimate:
    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((96, 32), (32, 32)))
    return em.estimate(program(), *shapes, on=POD)


def test_round_trip(answer: em.Estimate, tmp_path: Path) -> None:
    folder = answer.to_chakra(tmp_path / "et")
    groups = json.loads((folder / "comm_groups.json").read_text())
    steps = list(chakra.unrolled(answer.steps))
    for rank, nodes in enumerate(traces(folder, answer.name, 12)):
        ids = [n["id"] for n in nodes]
        assert len(set(ids)) == len(ids)
        assert all(set(n["data_deps"]) <= set(ids) for n in nodes)
        assert all(n["data_deps"] for n in nodes[1:]) and not nodes[0]["data_deps"]
        one_way = [n for n in nodes if n["type"] != chakra.COMM_RECV_NODE]  # beside its send
        assert sum(n["duration_micros"] for n in one_way) == int(answer.time_s * 1e6)
        collectives = [n for n in nodes if n["type"] == chakra.COMM_COLL_NODE]
        assert [n["comm_type"] for n in collectives] == [0, 0, 0, 2, 7]
        # A reduction's buffer; of the gathered result only what this rank gives.
        assert [n["comm_size"] for n in collectives] == [32 * 32 * 2] * 4 + [4 * 32 * 32 * 2]
        assert all(groups[n["pg_name"]] == [*range(4 * (rank // 4), 4 * (rank // 4) + 4)]
                   for n in collectives)  # fmt: skip
        after, before = (rank + 4) % 12, (rank - 4) % 12
        sends = [n for n in nodes if n["type"] == chakra.COMM_SEND_NODE]
        receives = [n for n in nodes if n["type"] == chakra.COMM_RECV_NODE]
        assert [(n["comm_src"], n["comm_dst"]) for n in sends] == [(rank, after)] * 3
        assert [(n["comm_src"], n["comm_dst"]) for n in receives] == [(before, rank)] * 3
        assert [n["comm_tag"] for n in sends] == [n["comm_tag"] for n in receives]
        assert len({n["comm_tag"] for n in sends}) == 3
        kernels = [s for s in steps if isinstance(s, Op)]
        computed = [n for n in nodes if n["type"] == chakra.COMP_NODE]
        assert [n["num_ops"] for n in computed] == [s.flops for s in kernels]
        assert [n["tensor_size"] for n in computed] == [s.bytes for s in kernels]


def test_half_a_trip_runs_every_second_time() -> None:
    kernel = Op(
        name="k", kind="vector", time_s=1e-6, bound_s=0.0, limited_by="vector", flops=1, bytes=1
    )
    inner = Loop(name="branch", trips=0.5, body=(kernel,))
    assert len(list(chakra.unrolled((Loop(name="loop", trips=7.0, body=(inner,)),)))) == 3
    endless = Loop(name="loop", trips=1e9, body=(kernel,))
    with pytest.raises(ValueError, match="more than 1,000,000 steps"):
        list(chakra.unrolled((endless,)))


def test_all_files_or_none(answer: em.Estimate, tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    full = tmp_path / "full"
    full.mkdir()
    (full / "other").touch()
    with pytest.raises(ValueError, match="not empty; name another folder"):
        answer.to_chakra(full)
    with pytest.raises(ValueError, match="there is no folder"):
        answer.to_chakra(tmp_path / "no" / "such")
    monkeypatch.setattr(chakra.json, "dumps", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer.to_chakra(tmp_path / "broken")
    assert list(tmp_path.iterdir()) == [full]


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63 - 1])
def test_varints(value: int) -> None:
    assert list(fields(protobuf.integer(3, value))) == [(3, value)]
    with pytest.raises(ValueError, match="at least 0"):
        protobuf.varint(-1)


def test_the_command_writes_them(cm384, tmp_path: Path) -> None:  # noqa: ANN001
    folder = tmp_path / "et"
    words = ("run", "matmul", "--size", "384", "--estimate", "--chakra", folder)
    answer = cm384(*words)
    assert answer.code == 0 and "Chakra traces of 384 devices" in answer.out, answer.err
    assert len(list(folder.glob("*.et"))) == 384
    again = cm384(*words)
    assert again.code == 2 and "name a new folder" in again.err and not again.out
