"""What people see of an estimate: tables, the trace, the page."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from rich.console import Console

from emulator.machines import cloudmatrix384, custom_machine
from emulator.report import Estimate, estimate
from emulator.report.compare import compare
from emulator.report.html import _lanes, page
from emulator.report.result import collective_rows, groups_of
from emulator.timeline import Timeline
from emulator.units import capacity, count, quantity, seconds, several

POD = cloudmatrix384()


@pytest.fixture(scope="module")
def answer() -> Estimate:
    mesh = POD.mesh(dp=48, tp=8)

    def layer(x: Any, w: Any) -> Any:
        return lax.psum(jax.nn.gelu(x @ w[0]) @ w[1], "tp").astype(x.dtype), None

    def network(x: Any, w: Any) -> Any:
        return lax.scan(layer, x, w)[0]

    f = jax.shard_map(
        network,
        mesh=mesh,
        in_specs=(P("dp"), (P(None, None, "tp"), P(None, "tp"))),
        out_specs=P("dp"),
    )
    s = jax.ShapeDtypeStruct
    w = (s((12, 1024, 4096), jnp.bfloat16), s((12, 4096, 1024), jnp.bfloat16))
    return estimate(f, s((48 * 512, 1024), jnp.bfloat16), w, on=POD)


def test_table_says_what_matters(answer: Estimate) -> None:
    text = str(answer.table())
    for words in (
        "CloudMatrix 384",
        "dp=48 x tp=8",
        seconds(answer.time_s),
        seconds(answer.bound_s),
        "matmul",
        "collective",
        "psum tp",
        "limited by",
        "GiB per device",
        "assumed",
        "measured",
        "no overlap",
        "args[1][0]",
        "test_report.py",
    ):
        assert words in text, words
    assert str(answer) == text


def test_table_renders_in_rich(answer: Estimate, capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(answer.table())
    out = capsys.readouterr().out
    assert "Where the time goes" in out
    assert max(map(len, out.splitlines())) <= 100


def test_shares_add_up(answer: Estimate) -> None:
    assert sum(answer.by_kind().values()) == pytest.approx(answer.time_s, rel=1e-6)
    assert sum(row.time_s for row in answer.rows()) == pytest.approx(answer.time_s, rel=1e-6)


def test_repr_is_one_line(answer: Estimate) -> None:
    assert "\n" not in repr(answer) and seconds(answer.time_s) in repr(answer)


def test_trace_is_what_perfetto_reads(answer: Estimate, tmp_path: Path) -> None:
    path = answer.to_perfetto(tmp_path / "trace.json")
    trace = json.loads(path.read_text())
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names == {"devices 0-383 (384 alike)"}
    assert all(e["dur"] > 0 and e["ts"] >= 0 for e in slices)
    end = max(e["ts"] + e["dur"] for e in slices)
    assert end == pytest.approx(answer.time_s * 1e6)
    (loop,) = (e for e in slices if e["cat"] == "loop")
    assert loop["args"]["trips"] == 12
    inside = [e for e in slices if e["cat"] != "loop"]
    assert all(
        loop["ts"] <= e["ts"] and e["ts"] + e["dur"] <= loop["ts"] + loop["dur"] for e in inside
    )
    assert sum(e["dur"] for e in inside) == pytest.approx(loop["dur"] / 12)
    collectives = [e for e in slices if e["cat"] == "collective"]
    assert collectives and all("algorithm" in e["args"] for e in collectives)


@pytest.mark.parametrize("overlap", [False, True])
def test_slices_of_a_track_lie_inside_one_another(overlap: bool, tmp_path: Path) -> None:
    """Also those of branches and loops that run less than once on average."""

    def f(x: Any) -> Any:
        def grow(x: Any) -> Any:
            return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c + 1, x)

        return lax.cond(x.sum() > 0, grow, lambda x: jnp.tanh(x @ x), x) @ x

    counts = {"cond_0": (0.3, 0.7), "while_0": 2.5}
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    e = estimate(f, x, on=POD, counts=counts, overlap=overlap)
    events = json.loads(e.to_perfetto(tmp_path / "t.json").read_text())["traceEvents"]
    slices = [
        (round(s["ts"] * 1e6), round((s["ts"] + s["dur"]) * 1e6)) for s in events if s["ph"] == "X"
    ]
    assert len(slices) > 6
    outer: list[int] = []
    for start, end in sorted(slices, key=lambda s: (s[0], -s[1])):
        while outer and outer[-1] <= start:
            outer.pop()
        assert end <= min(outer, default=e.timeline.time_ps)
        outer.append(end)


class Tags(HTMLParser):
    """Counts tags and checks that they close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(answer: Estimate, tmp_path: Path) -> None:
    text = answer.to_html(tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen["table"] == 6
    assert tags.seen["rect"] >= 4
    assert "http" not in text.replace("https://ui.perfetto.dev", "")
    assert seconds(answer.time_s) in text and "{{" not in text


def test_page_draws_one_trip_as_wide_as_its_loop(answer: Estimate) -> None:
    (lane,) = _lanes(answer)
    loop = next(s for s in lane["slices"] if s["title"].startswith("scan"))
    inside = [s for s in lane["slices"] if s["y"] == 1]
    assert sum(s["w"] for s in inside) == pytest.approx(loop["w"])
    assert min(s["x"] for s in inside) == pytest.approx(loop["x"])


def test_page_escapes_names(tmp_path: Path) -> None:
    def f(x: Any) -> Any:
        return x + 1

    f.__name__ = "<script>alert(1)</script>"
    e = estimate(f, jax.ShapeDtypeStruct((8,), jnp.float32), on=POD)
    assert "<script>" not in e.to_html(tmp_path / "page.html").read_text()


def test_empty_program_reports(tmp_path: Path) -> None:
    e = estimate(lambda x: x, jax.ShapeDtypeStruct((8,), jnp.float32), on=POD)
    assert e.time_s == e.bound_s == 0
    assert "0 s" in str(e)
    e.to_html(tmp_path / "page.html")
    assert json.loads(e.to_perfetto(tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (1.5, "1.50 s"),
        (0.0123, "12.3 ms"),
        (4.2e-6, "4.20 us"),
        (3e-10, "0.30 ns"),
        (999.6e-6, "1.00 ms"),
        (0.99949, "999 ms"),
        (99.96e-3, "100 ms"),
        (9.996, "10.0 s"),
        (0.9999, "1.00 s"),
        (2499.0, "2499 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_meshes_of_the_same_devices_are_two() -> None:
    def f(x: Any) -> Any:
        for mesh, spec in ((POD.mesh(x=8), P("x")), (POD.mesh(y=2, z=4), P(("y", "z")))):
            x = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)(x)
        return x

    e = estimate(f, jax.ShapeDtypeStruct((64,), jnp.float32), on=POD)
    assert "mesh x=8; y=2 x z=4 (8 packages)" in str(e)
    assert not [text for text in e.assumptions if "count on all" in text]


def test_work_in_a_smaller_mesh_is_said_to_count_on_all_devices() -> None:
    def f(x: Any) -> Any:
        for mesh, spec in ((POD.mesh(x=8), P("x")), (POD.mesh(y=2), P("y"))):
            x = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=spec, out_specs=spec)(x)
        return x

    e = estimate(f, jax.ShapeDtypeStruct((64,), jnp.float32), on=POD)
    (said,) = (text for text in e.assumptions if "count on all" in text)
    assert "a mesh of 2 devices count on all 8" in said


def test_names_are_no_markup() -> None:
    """A key `[bias]` would be a style to rich and vanish, `[/b]` an error."""

    class Key(str):
        def __repr__(self) -> str:
            return str(self)

    named = custom_machine("ring(2, 1GB/s)", name="rack [/2]")
    keys = (Key("bias"), Key("/b"))
    trees = {key: jnp.ones(4) for key in keys}
    found = compare(lambda tree: {k: 2 * v for k, v in tree.items()}, trees, on=[named])
    for text in (str(found), str(found.columns[0].answer)):
        assert "rack [/2]" in text and all(f"[{key}]" in text for key in keys)


def test_a_failure_leaves_no_half_file(answer: Estimate, tmp_path: Path, monkeypatch: Any) -> None:
    old = tmp_path / "t.json"
    old.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)  # as if interrupted after writing
    for write in (answer.to_perfetto, answer.to_html):
        with pytest.raises(ZeroDivisionError):
            write(old)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"] and old.read_text() == "old"


def test_page_says_how_many_lanes_it_leaves_out() -> None:
    mesh = POD.mesh(x=20)
    f = jax.shard_map(lambda x: x + 1, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    slow = POD.degrade(devices={d: (d + 1) / 40 for d in range(20)})
    e = estimate(f, jax.ShapeDtypeStruct((20, 2**20), jnp.float32), on=slow)
    assert "12 of 20 are drawn" in page(e)
    assert "are drawn" not in page(dataclasses.replace(e, timeline=answer_of_one(e)))


def answer_of_one(e: Estimate) -> Timeline:
    """The same timeline of its first device alone."""
    spans = tuple(
        dataclasses.replace(s, start_ps=s.start_ps[:1], end_ps=s.end_ps[:1])
        for s in e.timeline.spans
    )
    return Timeline(devices=e.devices[:1], clocks_ps=e.timeline.clocks_ps[:1], spans=spans)


def test_quantities() -> None:
    assert (several(1, "die"), several(16, "die")) == ("1 die", "16 dies")
    assert quantity(0.0421, "J") == "42.1 mJ"
    assert quantity(0.0, "J") == "0.00 J"
    assert quantity(353.9e12, "FLOP/s") == "354 TFLOP/s"
    assert quantity(0.85, "") == "0.85 "
    assert quantity(999.7e9, "B") == "1.00 TB"
    assert (capacity(1), capacity(2), capacity(1024)) == ("1 byte", "2 bytes", "1.00 KiB")
    assert (count(3.0), count(2.5)) == ("3", "2.50")


def test_collectives_are_counted_by_how_often_they_run(tmp_path: Path) -> None:
    """One in a loop that takes longest in all is first, on the page as in the table; the same axis
    in other groups is another collective.
    """
    mesh = POD.mesh(x=384)
    eights = [list(range(i, i + 8)) for i in range(0, 384, 8)]

    def f(x: Any) -> Any:
        def trip(x: Any, _: None) -> Any:
            return lax.psum(x, "x", axis_index_groups=eights), None

        x = lax.scan(trip, x, None, length=50)[0]
        return lax.psum(lax.psum(x, "x") + 1, "x")

    f = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    e = estimate(f, jax.ShapeDtypeStruct((1024,), jnp.float32), on=POD)
    found = [(groups_of(step), times) for step, times in collective_rows(e)]
    assert found == [("48 x 8", 50), ("1 x 384", 2)]
    text = str(e)
    assert text.index("48 x 8 ") < text.index("1 x 384 ")
    text = page(e)
    assert text.index('<td class="n">50</td>') < text.index('<td class="n">1 x 384</td>')


def test_page_draws_every_share_of_many_operations() -> None:
    """Kernels too narrow to see are drawn together: none is left out, none is over another."""

    def f(x: Any) -> Any:
        for _ in range(2500):
            x = jnp.tanh(x @ x)
        return x

    e = estimate(f, jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), on=POD, fusion="eager")
    (lane,) = _lanes(e)
    slices = lane["slices"]
    assert len(slices) <= len(e.timeline.spans) / 2
    for kind, time_s in e.by_kind().items():
        drawn = sum(s["w"] for s in slices if s["kind"] == kind)
        assert drawn == pytest.approx(1000 * time_s / e.time_s)
        half = sum(s["w"] for s in slices if s["kind"] == kind and s["x"] < 500)
        assert half == pytest.approx(drawn / 2, rel=0.01)
    for s, after in zip(slices, slices[1:], strict=False):
        assert s["x"] + s["w"] <= after["x"] + 1e-6
    assert "those of a kind are drawn as one" in page(e)


def test_wide_tables_scroll_by_themselves_and_by_keyboard(answer: Estimate) -> None:
    """On a phone the page itself stays as wide as the screen."""
    text = page(answer)
    assert text.count("<table>") == text.count('<div class="scroll" tabindex="0"><table>') == 6


@pytest.mark.parametrize("size", [512, 1000, 1024])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_slices_of_a_track_lie_inside_one_another_in_whole_nanoseconds(
    share: float, size: int, tmp_path: Path
) -> None:
    """As Perfetto reads them, which leaves out a slice that reaches over the end of another."""

    def f(x: Any) -> Any:
        def grow(x: Any) -> Any:
            return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c + 1, x)

        return lax.cond(x.sum() > 0, grow, lambda x: jnp.tanh(x @ x), x) @ x

    counts = {"cond_0": (share, 1 - share), "while_0": 1}
    e = estimate(f, jax.ShapeDtypeStruct((size, size), jnp.float32), on=POD, counts=counts)
    events = json.loads(e.to_perfetto(tmp_path / "t.json").read_text())["traceEvents"]
    outer: list[int] = []
    for event in (e for e in events if e["ph"] == "X"):
        start, duration = int(event["ts"] * 1000), int(event["dur"] * 1000)
        while outer and outer[-1] <= start:
            outer.pop()
        assert start + duration <= min(outer, default=start + duration), event["name"]
        outer.append(start + duration)


def test_rounding_to_picoseconds_is_no_waiting(tmp_path: Path) -> None:
    """Clocks are whole picoseconds, what collectives take is not."""
    f = jax.shard_map(
        lambda x: lax.psum(jnp.tanh(x), "x"), mesh=POD.mesh(x=8), in_specs=P(), out_specs=P()
    )
    for size in range(1000, 1010):
        e = estimate(f, jax.ShapeDtypeStruct((size,), jnp.float32), on=POD)
        events = json.loads(e.to_perfetto(tmp_path / "t.json").read_text())["traceEvents"]
        (waited,) = (x["args"]["waited for others"] for x in events if x.get("cat") == "collective")
        assert waited == "0 s"


def test_one_is_no_plural() -> None:
    e = estimate(jnp.tanh, jax.ShapeDtypeStruct((64,), jnp.float32), on=POD)
    assert [row.detail for row in e.rows()] == ["1 operation"]
    assert "on 1 device of" in repr(e)
