"""How long does an estimate of one matmul take: asked for the first time, and again?

Usage: python bench/matmul_time_speed.py

Prints one JSON line per case: the median and the worst of 500 different products, and the median of
the same product again, beside the limits of 200 and 5 microseconds.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import emulator as em

COLD_S, AGAIN_S = 200e-6, 5e-6
COUNT = 500


def main() -> None:
    root = str(Path(__file__).parent)
    command = ["git", "-C", root, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    machines = {
        "die": em.cloudmatrix384("die"),
        "package": em.cloudmatrix384(),
        "gb200_nvl72": em.gb200_nvl72(),
    }
    draw = random.Random(0)
    for name, on in machines.items():
        for batch in (1, 8):
            cold, again = [], []
            for i in range(COUNT + 1):
                m, k, n = (draw.randint(1, 20000) for _ in range(3))
                start = time.perf_counter()
                em.matmul_time(m, k, n, on=on, batch=batch)
                middle = time.perf_counter()
                em.matmul_time(m, k, n, on=on, batch=batch)
                if i:  # the first one builds the table of tilings
                    cold.append(middle - start)
                    again.append(time.perf_counter() - middle)
            line = {
                "case": f"{name}, batch {batch}",
                "cold_us": 1e6 * statistics.median(cold),
                "cold_best_us": 1e6 * min(cold),
                "cold_worst_us": 1e6 * max(cold),
                "again_us": 1e6 * statistics.median(again),
                "of_limit": [statistics.median(cold) / COLD_S, statistics.median(again) / AGAIN_S],
                "commit": commit,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
