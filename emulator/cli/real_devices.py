"""The real devices, of this host or of several, that `cm384 run` computes with."""

from __future__ import annotations

import os
from typing import Any

from emulator.cli.show import err, out
from emulator.machines import Machine


def real_devices(
    count: int | None,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    on: Machine,
) -> Any:
    """The argument `devices` of `em.run`. On a host without accelerators XLA makes `count` devices
    of its cores. All processes but the first are silent from here on.

    Raises:
        ValueError: options that do not belong together, or more devices than there are.
    """
    cluster = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in cluster.items() if value is None]
    if 0 < len(missing) < len(cluster):
        raise ValueError(
            f"{', '.join(missing)}: several processes need --coordinator HOST:PORT, --processes N "
            "and --process I (0 to N - 1), the same first two everywhere"
        )
    if count is None and missing:
        return None
    if count is not None and count > on.num_devices:
        raise ValueError(
            f"--real-devices {count}: {on.name} has {on.num_devices} devices to divide over them"
        )
    if process is not None and processes is not None and not 0 <= process < processes:
        raise ValueError(f"--process {process}: expected 0 to {processes - 1}")
    import jax

    if count is not None and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)
    if not missing:
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
        out.quiet = err.quiet = jax.process_index() > 0
    here = jax.local_devices()
    if count is not None and count > len(here):
        raise ValueError(f"--real-devices {count}: this host has {len(here)}: {here}")
    of_each = [jax.local_devices(process_index=i) for i in range(jax.process_count())]
    return [device for devices in of_each for device in devices[:count]]
