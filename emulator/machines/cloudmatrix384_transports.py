"""How CloudMatrix 384 moves bytes: vector-core load/store (AIV), SDMA engines, RoCE cards.

What was fitted stands at the top, to four digits. `cm384 validate --refit` finds the same numbers
again from the rows in `calibration/`; everything else is a published rate or a stated assumption.

One exchange (raise a flag, let all peers see it, look at theirs) costs the vector cores
`EXCHANGE_S` and the fabric's latency. The small-message kernel does it once for all peers and hides
the first half microsecond of its copies behind it; the large-message one does it peer by peer,
which explains its start-up of about 80 us among 16 dies, and then fills the link.
"""

from __future__ import annotations

from emulator.machines.fabric import Transport
from emulator.machines.fact import Citation, build, cite

GB = 10**9
us = 1e-6

EXCHANGE_S = 4.167 * us
HIDDEN_S = 0.598 * us
SMALL_BYTES_PER_S = 111.6 * GB
REDUCE_S_PER_BYTE = 0.8976e-12
REDUCE_STARTUP_S = 18.89 * us
SDMA_STARTUP_S = 125.6 * us
SDMA_MESSAGE_S = (
    ("read inside a node", 0.8013 * us),
    ("read between nodes", 3.128 * us),
    ("write between nodes", 3.195 * us),
)
ROCE_MESSAGE_S = 0.1811 * us
ROCE_BYTES_PER_S = 24.38 * GB
EXCHANGE_PHASES_S = (("dispatch", 47.41 * us), ("combine", 34.27 * us))

_UB_BYTES_PER_S = 196 * GB
_READ_LATENCY_S = 1.2 * us

_BENCH = "Horacehxw/msModeling comm_alignment_report_20260312 (CANN 8.5)"
_CM = "arXiv 2506.12708 v2 Table 1"
_MFH = "Ascend/memfabric_hybrid 7171ad35"
_HIXL = "hicann/hixl 9ed283b benchmarks"
_HCCL = "yzh1703456/cann-hccl 9aeddc0"

# The report's own "production minus benchmark" for small messages.
_OFFSETS_S = (
    ("all_gather", ((8, 1.2 * us), (16, 14.6 * us))),
    ("all_reduce", ((16, 7.7 * us),)),
    ("reduce_scatter", ((8, 2.0 * us),)),
)
_FACTOR = 1.028


def transports() -> tuple[Transport, ...]:
    """The machine's transports; `sdma` is the first that reaches the whole pod."""
    return (_aiv_small(), _aiv_large(), _sdma(), _sdma_write(), _roce())


def _reduce_rate() -> Citation:
    return cite(
        "inferred",
        _BENCH,
        "fit: how much slower reduce_scatter's bytes are than all_gather's, 16 dies",
        reduce_s_per_byte=REDUCE_S_PER_BYTE,
    )


def _production_factor() -> Citation:
    return cite(
        "inferred",
        _BENCH,
        "four rows above 100 us: production takes 2.0 to 3.6 % longer",
        production_factor=_FACTOR,
    )


def _aiv_small() -> Transport:
    return build(
        Transport,
        cite(
            "inferred",
            _BENCH,
            "fit: all_gather on 8 dies (1, 14, 465 KiB) and all_reduce on 16 (160 KiB)",
            step_s=EXCHANGE_S,
            overlap_s=HIDDEN_S,
            rates_bytes_per_s=(("package", SMALL_BYTES_PER_S), ("node", SMALL_BYTES_PER_S)),
        ),
        cite(
            "assumed",
            "the same rows leave nothing for a start-up of its own",
            startup_s=0.0,
            reduce_startup_s=0.0,
        ),
        cite(
            "measured",
            _BENCH,
            "medians of small messages; other operations and rank counts take their means",
            production_offsets_s=_OFFSETS_S,
        ),
        _reduce_rate(),
        name="aiv_small",
        scope="node",
        reads=True,
    )


def _aiv_large() -> Transport:
    exchange_s = EXCHANGE_S + _READ_LATENCY_S
    return build(
        Transport,
        cite(
            "inferred",
            _BENCH,
            "fit: the exchange of the small kernel, once for each peer; all_gather and "
            "reduce_scatter on 16 dies (1.3, 40 MiB)",
            message_s=(("package", exchange_s), ("node", exchange_s)),
            reduce_startup_s=REDUCE_STARTUP_S,
        ),
        cite(
            "inferred",
            f"{_BENCH}; {_MFH}",
            "the slope of all_gather is the whole UB rate: the partner die is reached over SIO "
            "(187 GB/s measured) meanwhile",
            rates_bytes_per_s=(("package", 187 * GB), ("node", _UB_BYTES_PER_S)),
        ),
        cite("assumed", "all in the exchanges", startup_s=0.0, step_s=0.0, overlap_s=0.0),
        _reduce_rate(),
        _production_factor(),
        name="aiv_large",
        scope="node",
        reads=True,
    )


def _sdma() -> Transport:
    return _sdma_form(
        "sdma",
        cite(
            "inferred",
            _BENCH,
            "tasks expanded by the AI CPU: what remains of all_gather on 8 dies (596 KiB); "
            "between nodes assumed the same",
            startup_s=SDMA_STARTUP_S,
        ),
        "read between nodes",
        cite(
            "measured",
            f"{_CM}; {_MFH}",
            "reads: HCCL's peers pull",
            rates_bytes_per_s=(("package", 187 * GB), ("node", 167 * GB), ("pod", 164 * GB)),
        ),
    )


def _sdma_write() -> Transport:
    return _sdma_form(
        "sdma_write",
        cite("inferred", _BENCH, "as for reads", startup_s=SDMA_STARTUP_S),
        "write between nodes",
        cite(
            "measured",
            f"{_CM}; {_MFH}",
            "writes: for algorithms that push",
            rates_bytes_per_s=(("package", 187 * GB), ("node", 137 * GB), ("pod", 135 * GB)),
        ),
    )


def _sdma_form(name: str, startup: Citation, between: str, rates: Citation) -> Transport:
    """What reads and writes have in common; writes are used on request only."""
    message_s = dict(SDMA_MESSAGE_S)
    inside = message_s["read inside a node"]
    return build(
        Transport,
        startup,
        cite(
            "inferred",
            _HIXL,
            "fit: blocks of 16 KiB to 2 MiB; inside a package as inside a node, writes as reads",
            message_s=(("package", inside), ("node", inside), ("pod", message_s[between])),
        ),
        cite("documented", _HCCL, "a notify to another chip", step_s=1.0 * us),
        cite(
            "assumed",
            "in-line reduction: no start-up of its own is published",
            reduce_startup_s=0.0,
            overlap_s=0.0,
        ),
        _reduce_rate(),
        _production_factor(),
        rates,
        name=name,
        scope="pod",
        reads=name == "sdma",
        on_request=name != "sdma",
    )


def _roce() -> Transport:
    return build(
        Transport,
        cite("assumed", "not published", "taken as SDMA's", startup_s=SDMA_STARTUP_S),
        cite(
            "inferred",
            _HIXL,
            "fit: blocks of 16 KiB to 2 MiB between nodes; the card's port gives 25",
            message_s=tuple((t, ROCE_MESSAGE_S) for t in ("package", "node", "pod")),
            rates_bytes_per_s=tuple((t, ROCE_BYTES_PER_S) for t in ("package", "node", "pod")),
        ),
        cite(
            "documented",
            _HCCL,
            "older profiling constant of an RDMA step: 7 us",
            step_s=7.0 * us,
        ),
        cite(
            "assumed",
            "reductions as SDMA's; the link's latency is added as if it were UB's",
            reduce_startup_s=0.0,
            overlap_s=0.0,
        ),
        _reduce_rate(),
        _production_factor(),
        name="roce",
        scope="pod",
        reads=False,
        on_request=True,
    )
