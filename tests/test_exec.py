"""`cm384 exec`: whole scripts, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import emulator as em
from emulator.script.clock import PodClock
from emulator.script.eager import Eager
from emulator.script.report import report
from emulator.script.steps import Function, Steps
from emulator.units import seconds
from tests.conftest import Answer

ROOT = Path(__file__).resolve().parent.parent
POD = em.cloudmatrix384()
Script = Callable[..., Answer]

COMMAND = "import sys; sys.argv[0] = 'cm384'; from emulator.cli import main; main()"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Writes a script and runs it on 8 devices, with native matmuls unless told otherwise."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(
        text: str, *words: str, options: tuple[str, ...] = ("--arithmetic", "native")
    ) -> Answer:
        (tmp_path / "train.py").write_text(text)
        line = [sys.executable, "-c", COMMAND, "exec", "--devices", "8", *options, "train.py"]
        done = subprocess.run([*line, *words], cwd=tmp_path, capture_output=True, text=True)
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


DATA_PARALLEL = """
import functools, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("dp",))
print("devices", jax.device_count(), "arguments", sys.argv[1:])

def loss_fn(params, x):
    return jnp.mean((jnp.maximum(x @ params["in"], 0) @ params["out"]) ** 2)

@functools.partial(jax.jit, static_argnames="rate", donate_argnums=0)
def step(params, x, *, rate):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P())
    def local(params, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        return jax.lax.psum(loss, "dp"), grads
    loss, grads = local(params, x)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), loss

# Powers of two and few of them: every sum is exact in whatever order.
params = {"in": jnp.ones((4, 8)) / 4, "out": jnp.ones((8, 2)) / 8}
params = jax.device_put(params, NamedSharding(mesh, P()))
x = np.arange(64.0, dtype=np.float32).reshape(16, 4) / 64
x = jax.device_put(x, NamedSharding(mesh, P("dp")))
spent = []
for _ in range(3):
    old = params["in"]
    began = time.perf_counter()
    params, loss = step(params, x, rate=0.125)
    jax.block_until_ready(loss)
    spent.append(time.perf_counter() - began)
    assert old.is_deleted()
    print("loss", float(loss), params["in"].sharding.spec, len(params["in"].devices()))
print("seconds", *(f"{s:.9f}" for s in spent))
print("mean", jnp.mean(x))
"""


def losses(text: str) -> list[float]:
    return [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss")]


def row(text: str, function: str) -> list[str]:
    """The columns of a function in the report."""
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [function])
    return re.split(r"\s{2,}", line.strip())


def natively(folder: Path) -> str:
    """What the script prints on eight host devices of JAX's own."""
    return subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_data_parallel_script(run: Script, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    answer = run(
        DATA_PARALLEL, "--lr", "1", options=("--arithmetic", "native", "--trace", str(trace))
    )
    assert answer.code == 0, answer.err
    assert "devices 8 arguments ['--lr', '1']" in answer.out
    native = natively(tmp_path)
    # Native sums have another order: a few units in the last place of FP32.
    assert losses(answer.out) == pytest.approx(losses(native), rel=1e-5)
    assert answer.out.count(" P() 8") == native.count(" P() 8") == 3
    # What the script's clock has shown is what the report says, to its three digits.
    name, where, calls, total, each, *_, mesh = row(answer.out, "step")
    assert (where, calls, mesh) == ("train.py:12", "3", "dp=8")
    (seconds,) = (line.split()[1:] for line in answer.out.splitlines() if line[:7] == "seconds")
    assert len(set(seconds)) == 1
    assert each.endswith(" us") and f"{float(seconds[0]) * 1e6:.3g}" == each.removesuffix(" us")
    # The mean was no step.
    assert re.search(r"_mean\s+train.py:36\s+1\s+8", answer.out)
    assert trace.stat().st_size


PMAP = """
import functools, time
import jax, jax.numpy as jnp, numpy as np

@functools.partial(jax.pmap, axis_name="i", in_axes=(None, 0))
def step(w, x):
    return jax.lax.psum(w * x, "i"), jax.lax.axis_index("i")

n = jax.local_device_count()
began = time.monotonic()
total, index = step(2.0, np.arange(2.0 * n, dtype=np.float32).reshape(n, 2))
total.block_until_ready()
print("took", time.monotonic() - began > 0, np.asarray(total[3]), np.asarray(index))
"""


def test_a_pmap_script(run: Script) -> None:
    answer = run(PMAP)
    assert answer.code == 0, answer.err
    assert "took True [112. 128.] [0 1 2 3 4 5 6 7]" in answer.out
    assert row(answer.out, "step")[1:3] == ["train.py:5", "1"]


AUTO_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
def put(x, *spec): return jax.device_put(x, NamedSharding(mesh, P(*spec)))
w1, w2 = put(jnp.ones((4, 8)), None, "tp"), put(jnp.ones((8, 4)), "tp")
x = put(jnp.arange(64.0).reshape(16, 4), "dp")

def loss(w1, w2, x): return jnp.sum(x @ w1 @ w2)
grad = jax.jit(jax.grad(loss, (0, 1)))
a, b = grad(w1, w2, x)
print("gradient", float(a[0, 0]), float(b[0, 0]), a.sharding.spec, b.sharding.spec)
compiled = grad.lower(w1, w2, x).compile()
print("compiled", *(bool((y == z).all()) for y, z in zip(compiled(w1, w2, x), (a, b))))
outer = jax.grad(lambda w: jnp.sum(jax.jit(jnp.matmul)(x, w)))(w1)
print("outer", float(outer[1, 0]), jax.eval_shape(grad, w1, w2, x)[0].shape)
print("mapped", jax.vmap(jax.jit(lambda v: v * 2))(x).sharding.spec)
"""


def test_an_auto_sharded_script(run: Script) -> None:
    answer = run(AUTO_SHARDED)
    assert answer.code == 0, answer.err
    # Sums of small integers: 4 (0 + 4 + ... + 60) and 0 + 1 + ... + 63.
    assert "gradient 1920.0 2016.0 P(None, 'tp') P('tp',)" in answer.out
    assert "compiled True True" in answer.out
    assert "outer 496.0 (4, 8)" in answer.out  # 1 + 5 + ... + 61
    assert "mapped P('dp',)" in answer.out
    assert row(answer.out, "loss")[1:3] == ["train.py:10", "2"]


OF_MANY_KINDS = """
import functools, os, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
devices = np.array(jax.devices())[[5, 2, 7, 0, 1, 6, 3, 4]]
mesh = Mesh(devices, ("d",))
x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, P("d")))

def timed(f, *args):
    began = time.perf_counter()
    out = f(*args)
    return out, time.perf_counter() - began

# The order of the devices is the mesh's.
@jax.jit
@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
def shifted(x):
    return jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)])
y = shifted(x)
where = {int(s.data[0]): s.device.id for s in y.addressable_shards}
print("permuted", y.tolist(), where[7], where[0])

# References: read and written by a step.
@jax.jit
def add(total, count, v):
    total[...] += v.sum()
    count[...] += 1
total, count = jax.new_ref(jnp.float32(1)), jax.new_ref(jnp.int32(0))
for _ in range(3):
    add(total, count, np.arange(8.0, dtype=np.float32))
print("references", float(total[...]), int(count[...]))

# Python numbers stay weak.
two = jax.jit(lambda: 2.0)()
print("weak", two.weak_type, jax.jit(lambda v: v * two)(jnp.ones(3, jnp.bfloat16)).dtype)

# Loops and branches take the time that they took.
@jax.jit
def loop(n):
    return jax.lax.while_loop(lambda i: i < n, lambda i: i + 1, jnp.int32(0))
(_, short), (turns, long) = timed(loop, np.int32(2)), timed(loop, np.int32(200))
print("loop", int(turns), 50 < long / short < 150)
@jax.jit
def branch(p, v):
    return jax.lax.cond(p, lambda v: v @ v, lambda v: v, v)
v = jnp.ones((64, 64))
(_, product), (_, same) = (timed(branch, np.bool_(p), v) for p in (True, False))
print("branch", product > same)
print("asleep", timed(time.sleep, 0.01)[1] > 0.009)

def scaled(rate, v): return v * rate
jax.jit(functools.partial(scaled, np.float32(2)))(v)
busy = timed(lambda: [np.sort(np.arange(1000)) for _ in range(500)])[1]
print("host", busy > 0)
if "fail" in sys.argv: raise SystemExit(4)
"""


def test_many_kinds_of_steps(run: Script) -> None:
    answer = run(OF_MANY_KINDS, "fail")
    assert answer.code == 4
    lines = answer.out.splitlines()
    # Device 4 is the last of the mesh, and what it has had goes to the first, device 5.
    assert lines[0] == "permuted [7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] 5 2"
    assert lines[1:3] == ["references 85.0 3", "weak True bfloat16"]
    assert lines[3:7] == ["loop 200 True", "branch True", "asleep True", "host False"]
    assert row(answer.out, "scaled")[1:3] == ["train.py:55", "1"]
    assert row(answer.out, "add")[1:3] == ["train.py:28", "3"]
    assert "outside the model" not in answer.err
    # A busy host may also say what takes it long.
    said = [line for line in answer.err.splitlines() if "reading and compiling" not in line]
    assert "\n".join(said) == (
        "cm384: the script asks for 4 devices and was given 8; "
        "cm384 exec --devices 4 gives it as many"
    )


def test_the_hosts_time_can_count(run: Script) -> None:
    answer = run(OF_MANY_KINDS, options=("--host-time", "--overlap", "--fusion", "eager"))
    assert answer.code == 0, answer.err
    assert "host True" in answer.out and "loop 200" in answer.out


HAS_NO_TIME = """
import jax, jax.numpy as jnp
@jax.jit
def known(x): return 2 * x
@jax.jit
def asks(x): return jax.lax.dot(*[x.astype(jnp.float8_e4m3fn)] * 2, preferred_element_type=x.dtype)
print(float(asks(known(jnp.ones((2, 2))))[0, 0]))
"""

ASKS_THE_HOST = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
x = jax.device_put(np.arange(8.0), NamedSharding(jax.make_mesh((8,), ("x",)), P("x")))
@jax.jit
def asks(x):
    jax.debug.print("sum {}", x.sum())
    return jax.pure_callback(lambda x: x + 1, jax.typeof(x), x)
print(float(asks(x).sum()))
@jax.jit
def checks(x):
    wrong = lambda x: jax.pure_callback(lambda x: 1 / 0, jax.typeof(x), x)
    return jax.lax.cond(x.sum() < 0, wrong, lambda x: x, x)
checks(jnp.ones(8))
"""


def test_what_has_no_time_is_said_to_be_outside_the_model(run: Script) -> None:
    answer = run(HAS_NO_TIME)
    assert answer.code == 0 and answer.out.startswith("8.0\n")
    assert answer.err.startswith("cm384: asks (train.py:5) is outside the model: ")
    assert "float8_e4m3fn" in answer.err
    assert "Outside the model: asks (train.py:5) ran on this host in no pod time" in answer.out
    assert not any(line.split()[:1] == ["asks"] for line in answer.out.splitlines())


BOUND = """
import jax, jax.numpy as jnp
x, devices = jnp.arange(4), jax.devices()
step = jax.jit(lambda v: v * 2)
for v in (x, jax.device_put(x, devices[3]), jax.device_put(x, devices[1]), x):
    result = step(v)
    print("bound", result, result.devices(), result.committed)
try:
    jax.jit(lambda v, w: v + w)(jax.device_put(x, devices[3]), jax.device_put(x, devices[1]))
except ValueError as error:
    print("bound", error)
a, b = jax.device_put(x, devices[3]), jax.device_put(jax.random.key(0), devices[1])
part = jax.NamedSharding(jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,)), jax.P("x"))
ignore = jax.jit(lambda _, v: v * 2)
for v in (a, jax.device_put(x, part), x):
    result = ignore(b, v)
    print("bound", result, sorted(d.id for d in result.devices()))
token = jax.lax.create_token()
passed = jax.jit(lambda v, t: (v + 1, t), donate_argnums=0)(jnp.arange(4), token)
print("bound", passed[0], type(passed[1]))
"""


def test_arguments_bound_to_a_device(run: Script, tmp_path: Path) -> None:
    answer = run(BOUND)
    assert answer.code == 0, answer.err
    said = [line for line in answer.out.splitlines() if line.startswith("bound")]
    assert said == natively(tmp_path).splitlines() and len(said) == 9
    assert "incompatible devices" in said[4] and "which it should not" not in answer.err


REFUSED_BY_JAX = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
mesh = Mesh(jax.devices(), "x")
send = lambda v: jax.lax.ppermute(v, "x", [(0, 1), (0, 2)])
step = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
try:
    step(jnp.arange(8.0))
except ValueError as error:
    print("refused", error)
print(float(jax.jit(lambda v: v + 1)(1.0)))
"""


def test_what_jax_refuses_is_not_laid_at_our_door(run: Script) -> None:
    answer = run(REFUSED_BY_JAX)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("refused ") and "\n2.0\n" in answer.out
    assert answer.err == "" and "Outside the model: s" not in answer.out


def test_no_number_of_the_report_is_cut_short() -> None:
    steps = Steps(POD, PodClock())
    mesh = POD.mesh(**{f"an_axis_of_size_{n}_x{i}": n for i, n in enumerate([2, 3] * 3)})
    step = jax.shard_map(lambda v: v * 2, mesh=mesh, in_specs=P(), out_specs=P())
    last = em.estimate(step, 1.0, on=POD)
    function = Function(name="step", where="train.py:1", calls=1, time_s=last.time_s, last=last)
    steps.functions["step", "train.py:1"] = function
    out = Console(width=160, file=StringIO())
    out.print(report(POD, 384, steps, Eager(), 0.0))
    text = out.file.getvalue()
    assert "…" not in text and text.count(f" {seconds(last.time_s)} ") == 2


GUARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_transfer_guard", "disallow")
mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, P("x")))
table = np.arange(8.0, dtype=np.float32)
print(float(jax.device_get(jax.jit(lambda v: (v * table).sum())(x))))
"""


def test_a_script_may_guard_its_transfers(run: Script) -> None:
    answer = run(GUARDED)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("140.0\n") and "Outside the model" not in answer.out


def test_calls_to_the_host_are_made_once_and_take_no_time(run: Script) -> None:
    answer = run(ASKS_THE_HOST)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("sum 28.0\n36.0\n")
    assert row(answer.out, "asks")[1:3] == ["train.py:5", "1"]
    said = "Outside the model: the calls of asks (train.py:5) to the host, in no pod time"
    assert said in answer.out
    assert "the calls of checks" not in answer.out  # in a branch that is not taken


NEEDS_VALUES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.arange(8.0)

def signed(v):
    return v if jax.lax.psum(v, "x")[0] < 0 else -v

def shaped(shape, v):
    return v.reshape(shape)

print(jax.shard_map(signed, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x).tolist())
rows = jax.shard_map(shaped, mesh=mesh, in_specs=(None, P("x")), out_specs=P("x"))([1, 1], x)
print(rows.shape)
"""


def test_a_shard_map_whose_python_asks_for_values_runs_on_the_host(run: Script) -> None:
    answer = run(NEEDS_VALUES + "print(float(jax.jit(jnp.sum)(x)))")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("[-0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]\n(8, 1)\n28.0")
    assert re.search(r"shard_map\s+train.py:13\s+1\b", answer.out)


DECORATED = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

@jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P())
def total_of(v):
    return jax.lax.psum(v, "x")

print(total_of(jnp.arange(8.0)).tolist())
"""


def test_a_function_decorated_by_shard_map_is_a_step(run: Script) -> None:
    answer = run(DECORATED)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("[4.0, 6.0, 8.0, 10.0]")
    assert re.search(r"total_of\s+train.py:\d+\s+1\b", answer.out)


def test_exit_status_and_traceback_are_the_scripts(run: Script) -> None:
    text = "import sys, jax\njax.jit(lambda x: x + 1)(1.0)\nsys.exit(int(sys.argv[1]))"
    assert run(text, "3").code == 3
    answer = run("def f():\n    raise KeyError('mine')\nf()")
    assert answer.code == 1
    assert answer.err.startswith("Traceback") and "emulator" not in answer.err
    assert 'train.py", line 2, in f' in answer.err and "KeyError: 'mine'" in answer.err
    assert "jax.jit" not in answer.err  # it may have failed before it came to its step


def test_a_script_without_steps_is_told(run: Script) -> None:
    answer = run("import jax.numpy as jnp\nprint(jnp.ones(3).sum())")
    assert answer.code == 0 and answer.out == "3.0\n"
    assert answer.err.startswith("cm384: train.py called no function made by jax.jit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "no such file: nowhere.py"),
        (["--devices", "400", "x.py"], "--devices 400: CloudMatrix 384 has 384 devices"),
        (["--trace", "no/such/t.json", "x.py"], "there is no folder"),
        (["--arithmetic", "abacus", "x.py"], "abacus"),
        (["--fusion", "cold", "x.py"], "expected one of chains, eager"),
    ],
)
def test_refusals_are_one_message(
    words: list[str],
    message: str,
    cm384: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "x.py").write_text("")
    monkeypatch.chdir(tmp_path)
    answer = cm384("exec", *words)
    assert answer.code == 2
    assert answer.err.startswith("cm384: ") and message in answer.err


def test_the_clock_is_the_pods_for_scripts_only() -> None:
    import time
    import timeit

    clock = PodClock()
    script: dict[str, object] = {"__name__": "__main__", "time": time, "timeit": timeit}
    library: dict[str, object] = {"__name__": "queue", "time": time}
    reading = "(time.perf_counter(), time.time_ns(), timeit.default_timer())"
    with clock.shown():
        before, host = eval(reading, script), eval("time.monotonic()", library)
        assert eval(reading, script) == before
        clock.advance(2.0)
        after = eval(reading, script)
        assert after[0] - before[0] == pytest.approx(2.0)
        assert after[1] - before[1] == 2_000_000_000
        assert after[2] == after[0]
        assert eval("time.monotonic()", library) - host < 2.0
        step = "timeit.timeit(step, number=3), timeit.repeat(step, number=1, repeat=2)"
        three, ones = eval(step, {**script, "step": lambda: clock.advance(2.0)})
        assert three == pytest.approx(6.0) and ones == pytest.approx([2.0, 2.0])
    assert timeit.timeit(number=1) < 2.0
    assert time.perf_counter() < time.perf_counter()


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_the_report_ends_where_its_reader_does(tmp_path: Path, lines: int) -> None:
    script = tmp_path / "train.py"
    script.write_text("import jax\nprint('first', jax.jit(lambda x: x + 1)(1.0))\n")
    line = [sys.executable, "-c", COMMAND, "exec", "--devices", "1", "--trace", "t.json", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, cwd=tmp_path, text=True, env=environment, **pipes) as process:
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    # The script's own print may break, as it would under Python; the report says nothing of it.
    assert errors.count("Traceback") <= (lines == 0), errors
    assert (tmp_path / "t.json").exists() or lines == 0


def test_a_trace_that_cannot_be_written_is_one_message(run: Script) -> None:
    """The script makes a folder where the file was to be."""
    script = "import jax, pathlib\njax.jit(lambda x: x + 1)(1.0)\n"
    script += "pathlib.Path('t.json/t').mkdir(parents=True)\n"
    answer = run(script, options=("--trace", "t.json"))
    assert answer.code == 2 and "pod time" in answer.out
    assert answer.err.startswith("cm384: --trace: ") and "t.json" in answer.err
    assert "Traceback" not in answer.err


def test_algorithms_are_the_commands(run: Script) -> None:
    """Their bits and their time are those of `em.run` with the same algorithms."""
    x = np.random.default_rng(0).standard_normal((8, 96)).astype(ml_dtypes.bfloat16)
    script = """
import functools, time
import jax, numpy as np, ml_dtypes
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).standard_normal((8, 96)).astype(ml_dtypes.bfloat16)
@jax.jit
@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P())
def total(x):
    return jax.lax.psum(x, "x")
began = time.perf_counter()
y = total(x)
print("seconds", repr(time.perf_counter() - began))
print("bits", np.asarray(y).tobytes().hex())
"""
    machine = em.cloudmatrix384()
    mesh = machine.mesh(x=8)
    total = jax.shard_map(lambda v: jax.lax.psum(v, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())
    seen = set()
    for algorithm in ("ring", "full_mesh"):
        option = f"all_reduce={algorithm}"
        answer = run(script, options=("--arithmetic", "native", "--algorithms", option))
        assert answer.code == 0, answer.err
        said = dict(
            line.split() for line in answer.out.splitlines() if line[:4] in ("seco", "bits")
        )
        wanted = em.run(total, x, on=machine, algorithms={"all_reduce": algorithm})
        assert said["bits"] == np.asarray(wanted.value).tobytes().hex()
        assert float(said["seconds"]) == pytest.approx(wanted.time_s, rel=1e-6)
        seen.add(said["bits"])
    assert len(seen) == 2
    answer = run(script, options=("--algorithms", "all_reduce=fastest"))
    assert answer.code == 2 and "unknown algorithm 'fastest'" in answer.err


#: What a script still has after donating it, and what a compiled step does not take.
GIVEN_AWAY = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("x",))
rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
def gone(name, f, *args, **options):
    options = {"donate_argnums": tuple(range(len(args))), **options}
    jax.block_until_ready(jax.jit(f, **options)(*args))
    print("gone", name, [x.is_deleted() for x in args])
ones = lambda *shape: jnp.ones(shape)
gone("same", lambda x: x + 1, ones(8, 2))
gone("larger", lambda x: x @ x.T, ones(8, 2))
gone("as many bytes", lambda x: x.reshape(16).astype(jnp.int32), ones(8, 2))
gone("of two", lambda x, y: y + 1, ones(3).astype(int), ones(3))
gone("one for two", lambda x: (x + 1, x + 2), ones(3))
gone("divided", lambda x: x + 1, jax.device_put(ones(8, 2), rows))
gone("gathered", lambda x: x + 1, jax.device_put(ones(8, 2), rows), out_shardings=whole)
compiled = jax.jit(lambda x: x @ x, in_shardings=rows).lower(ones(8, 8)).compile()
print("gone", float(compiled(jax.device_put(ones(8, 8), rows)).sum()))
for wrong in (ones(8, 8).astype(int), jax.device_put(ones(8, 8), whole)):
    try:
        compiled(wrong)
    except Exception as error:
        print("gone", type(error).__name__, str(error).splitlines()[0])
"""


def test_what_is_donated_and_what_is_compiled(run: Script, tmp_path: Path) -> None:
    answer = run(GIVEN_AWAY)
    assert answer.code == 0, answer.err
    said = [line for line in answer.out.splitlines() if line.startswith("gone")]
    assert said == natively(tmp_path).splitlines() and len(said) == 10


#: Results whose sharding a script may compare with what it asked for.
SPELLED = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax._src.shard_map import shard_map as inner_map
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

grid = np.array(jax.devices()).reshape(4, 2)
mesh, typed = Mesh(grid, ("x", "y")), Mesh(grid, ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
x = jax.device_put(x, NamedSharding(mesh, P("x", None)))
columns = NamedSharding(mesh, P("y", None))
on = functools.partial(jax.shard_map, mesh=mesh)
whole, rows = on(lambda v: v * 2, in_specs=P("x", None), out_specs=P("x", None)), P("x")
vector = np.arange(8.0, dtype=np.float32)

def say(name, value):
    for leaf in jax.tree.leaves(value):
        spec = getattr(getattr(leaf, "sharding", None), "spec", None)
        none = leaf.dtype == jax.dtypes.float0
        total = leaf.size if none else np.asarray(leaf).astype(np.float32).sum()
        print("spec", name, leaf.dtype, spec, total)

say("jit", jax.jit(whole)(x))
say("jit of numpy", jax.jit(whole)(np.asarray(x)))
say("eager", whole(x))
say("eager of numpy", whole(np.asarray(x)))
say("eager by its other name", inner_map(jnp.sin, mesh=mesh, in_specs=rows, out_specs=rows)(x))
with jax.set_mesh(mesh):
    say("eager over one axis", jax.smap(jnp.cos, in_axes=1, out_axes=1, axis_name="y")(x))
say("eager gradient", jax.grad(lambda v: whole(v).sum())(np.asarray(x)))
say("eager whole", on(lambda v: jax.lax.psum(v, "x"), in_specs=rows, out_specs=P(None, None))(x))
say("vmapped", jax.vmap(on(jnp.sin, in_specs=P("y"), out_specs=P("y")), spmd_axis_name="x")(x))
say("constraint", jax.jit(lambda v: jax.lax.with_sharding_constraint(v, columns))(x))
integers = jax.jit(
    lambda v, n: jax.grad(lambda v, n: (v * n).sum(), argnums=(0, 1), allow_int=True)(v, n),
    in_shardings=NamedSharding(mesh, P("x")),
)
say("integers", integers(vector, np.arange(8)))
try:
    jax.shard_map(jnp.sin, mesh=mesh.abstract_mesh, in_specs=rows, out_specs=rows)(vector)
except ValueError as error:
    print("spec", "eager without devices", error)
with jax.set_mesh(typed):
    a = jax.device_put(np.ones((8, 4), np.float32), P("x", None))
    say("typed", jax.jit(lambda v: v.T * 2)(a))
    r = jax.device_put(vector, P(reduced={"x"}))
    say("reduced", jax.jit(jax.shard_map(lambda v: v * v, out_specs=P(reduced={"x"})))(r))
    say("a literal", jax.jit(lambda v: jax.lax.full_like(v, 2.0))(jnp.float32(3)))

def renamed(v):  # goes on over the same devices by other names
    with jax.sharding.use_abstract_mesh(jax.typeof(v).sharding.mesh.update((8, 1), ("a", "b"))):
        if typed.abstract_mesh == jax.typeof(v).sharding.mesh:
            return jax.reshard(v, P(("a", "b"), None)) * 2
        return jax.lax.with_sharding_constraint(v, P("a")) * 2

for names in (typed, mesh):
    with jax.set_mesh(names):
        say("other names", jax.jit(renamed)(jax.device_put(np.asarray(x), P("x"))))
half = Mesh(grid, ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
with jax.set_mesh(half):  # its types say nothing of "x"
    say("half typed", jax.jit(lambda v: v * 2)(jax.device_put(np.asarray(x), P("x", "y"))))
made = [jax.make_jaxpr(f)(x) for f in (whole, jax.vmap(on(jnp.sin, in_specs=rows, out_specs=rows)))]
made.append(jax.make_jaxpr(jax.grad(lambda v: whole(v).sum()))(x))
print("spec made", [eqn.primitive.name for jaxpr in made for eqn in jaxpr.jaxpr.eqns])
keys = jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("x")))
print("spec keys", jax.jit(jax.vmap(lambda key: jax.random.fold_in(key, 1)))(keys).sharding.spec)
"""


LOOPS = """
import time
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("dp",), (jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("dp")))
w = jnp.ones((3, 4, 4)) / 4

def layer(h, w): return h @ w + 1, None
def net(w): return lax.scan(layer, x, w)[0].sum()

began = time.perf_counter()
loss, gradient = jax.value_and_grad(net)(w)
print("scan", loss, gradient[0, 0], time.perf_counter() > began)
for _ in range(2):
    print("fori", lax.fori_loop(0, 5, lambda i, v: v + i, np.ones(2)))
print("while", lax.while_loop(lambda v: v[0] < 50, lambda v: v * 2, jnp.ones(2)))
print("cond", lax.cond(jnp.sum(x) > 3, jnp.sin, jnp.cos, 0.0))
print("vmap", jax.vmap(lambda v: lax.fori_loop(0, 2, lambda i, v: v * 3, v))(jnp.ones(2)))
with jax.disable_jit():
    print("disabled", lax.fori_loop(0, 2, lambda i, v: v * 3, 1.0))
"""


def test_loops_outside_of_any_jit_are_steps(run: Script, tmp_path: Path) -> None:
    answer = run(LOOPS)
    assert answer.code == 0, answer.err
    assert "outside the model" not in answer.err
    (tmp_path / "train.py").write_text(LOOPS.replace(", time.perf_counter() > began", ", True"))
    shown = answer.out.partition("\npod time")[0]
    assert shown.strip() == natively(tmp_path).strip()
    steps, _, eager = answer.out.partition("eager operations")
    for name, line, calls in (("while", 19, 1), ("cond", 20, 1), ("scan", 18, 2), ("scan", 21, 1)):
        assert re.search(rf"{name} +train.py:{line} +{calls} ", steps), (name, line)
    assert re.search(r"scan +train.py:12 +2 .* dp=8", steps)  # forwards and backwards
    assert not re.search(r"\b(scan|while|cond) ", eager)


OF_MANY_NAMES = """
import functools
import jax, jax.numpy as jnp

class Policy:
    def __call__(self, x): return jnp.sin(x)

def body(c, _): return c * 2, None
jax.jit(functools.partial(jax.lax.scan, body))(1.0, jnp.arange(3))
policy = jax.jit(Policy())
policy(1.0)
jax.jit(jax.vmap(functools.partial(jnp.add, 1.0)))(jnp.ones(2))
jax.pmap(lambda v: v * 2)(jnp.ones(8))
jax.jit(jnp.tanh)(1.0)
"""


def test_every_step_has_a_name_and_a_place(run: Script) -> None:
    steps = run(OF_MANY_NAMES).out.partition("Outside")[0]
    for name, line in (("scan", 9), ("<unnamed function>", 11), ("add", 12), ("tanh", 14)):
        assert re.search(rf"^ +{name} +train.py:{line} +1 ", steps, re.MULTILINE), name
    assert re.search(r"^ +<lambda> +train.py:13 +1 .* pmap=8 *$", steps, re.MULTILINE)


MEMORY = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

first, last = jax.local_devices()[0], jax.local_devices()[-1]
print("before", first.memory_stats())
key = jax.random.key(0)
mesh = jax.make_mesh((8,), ("dp",), (jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((1024, 256)), NamedSharding(mesh, P("dp")))
y = jax.jit(lambda v: jnp.sin(jnp.sort(v)))(x)
print("after", last.memory_stats())
"""


def test_a_device_says_what_memory_the_machines_has(run: Script) -> None:
    answer = run(MEMORY)
    assert answer.code == 0, answer.err
    before, after = (eval(text) for text in re.findall(r"(?:before|after) (.*)", answer.out))
    limit = em.cloudmatrix384().memory_bytes_per_device
    assert before == {"bytes_in_use": 0, "bytes_limit": limit, "peak_bytes_in_use": 0}
    mine = 4 * 1024 * 256 // 8
    assert after["bytes_in_use"] == 2 * mine and after["bytes_limit"] == limit
    assert after["peak_bytes_in_use"] >= 2 * mine


def test_shardings_are_spelled_as_jax_spells_them(run: Script, tmp_path: Path) -> None:
    answer = run(SPELLED)
    assert answer.code == 0, answer.err
    native = natively(tmp_path)
    said = [line for line in answer.out.splitlines() if line.startswith("spec")]
    assert said == native.splitlines() and len(said) == 21
    assert "shard_map" not in answer.out.partition("eager operations")[2]  # all are steps
    assert "which it should not" not in answer.err + answer.out


def test_names_that_standard_output_cannot_show_are_escaped(
    run: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    text = "import jax\n@jax.jit\ndef größe(x): return x + 1\nprint(größe(1))"
    answer = run(text)
    assert answer.code == 0 and "gr\\xf6\\xdfe" in answer.out, answer.err
    answer = run(text + "\nprint('größe')")  # the script's own output is its own affair
    assert answer.code == 1 and "UnicodeEncodeError" in answer.err
