"""Copies between a device's memory and its host's: `device_put` to another memory space, and what
`jax.checkpoint` policies that offload make of residuals.
"""

from __future__ import annotations

from collections import Counter

from emulator.program import cost_kernels
from emulator.program.graph import Node, on_host
from emulator.program.walker import Frame, Walker
from emulator.program.where import where
from emulator.timeline import Op


def device_put(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """A copy, over the host's links if it goes from one memory to the other.

    All devices copy at the same time: those of a node share its links.
    """
    avals = frame.graph.avals
    v, w = node.ins[0], node.outs[0]
    from_host = v is not None and on_host(avals[v])
    to_host = on_host(avals[w])
    if from_host == to_host or v is None:
        return cost_kernels.move(walker, frame, index, node)
    on = walker.on
    port = next((p for p in on.fabric.ports if p.name == "host"), None)
    if port is None:
        walker.assume(
            f"a copy between device and host memory takes as long as one in device memory: "
            f"{on.name} has no number for its links to the hosts"
        )
        return cost_kernels.move(walker, frame, index, node)
    sharing = max(Counter(map(on.node_of, walker.groups.devices)).values())
    share = port.per_node * port.bytes_per_s / sharing
    reached = port.write_bytes_per_s if to_host else port.read_bytes_per_s
    count = walker.bytes(frame, w)
    at_least_s = walker.kernel(node.name, "move", 0, count, node).time_s  # in its own memory
    linked_s = port.latency_s + count / min(share, on.dies_per_device * reached)
    op = Op(
        name="copy to host" if to_host else "copy from host",
        kind="move",
        time_s=max(at_least_s, linked_s),
        bound_s=count / share,
        limited_by="host link",
        flops=0,
        bytes=count,
        memory_s=count / walker.memory_rate,
        where=where(node.eqn),
    )
    walker.assume(
        f"all devices of a node copy to or from its hosts at once, {port.per_node} links of "
        f"{port.bytes_per_s / 1e9:g} GB/s shared by {sharing}; host memory is large enough"
    )
    walker.emit(frame, op, node)
