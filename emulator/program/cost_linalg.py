"""Costs of factorisations and Fourier transforms: textbook operation counts on the vector units."""

from __future__ import annotations

import math

from emulator.program.graph import Node
from emulator.program.walker import Frame, Walker

# Lane operations per cubic size of one matrix (n x n; for m x n the longer side times the square of
# the shorter), real arithmetic. Golub and Van Loan, Matrix Computations, 4th ed.: Cholesky n^3 / 3
# (4.2), LU 2 n^3 / 3 (3.2), QR and the product of its reflectors 2 n^2 (m - n / 3) each (5.2),
# Hessenberg 10 n^3 / 3 (7.4), Schur 25 n^3 (7.5), symmetric eigenvalues with vectors 9 n^3 (8.3),
# singular values with vectors 22 n^3 (8.6).
CUBIC: dict[str, float] = {
    "cholesky": 1 / 3,
    "lu": 2 / 3,
    "qr": 4,
    "geqrf": 2,
    "geqp3": 2,
    "householder_product": 2,
    "ormqr": 4,
    "hessenberg": 10 / 3,
    "tridiagonal": 4 / 3,
    "eigh": 9,
    "schur": 25,
    "eig": 35,
    "svd": 22,
}
_NOTE = (
    "factorisations, triangular solves and Fourier transforms: textbook operation counts on the "
    "vector units, operands read and results written once (assumed: no library times are public)"
)


def linear_algebra(walker: Walker, frame: Frame, index: int, node: Node) -> None:
    """One factorisation, solve or transform of a batch of matrices on one device."""
    walker.note_replicated(frame, node.outs)
    walker.assume(_NOTE)
    v = node.ins[0] if node.ins[0] is not None else node.outs[0]
    shape = walker.shape(frame, v)
    complex_ = 4 if "complex" in str(walker.dtype(frame, v)) and node.name != "fft" else 1
    ops = complex_ * _operations(walker, frame, node, shape)
    traffic = walker.read_bytes(frame, node) + walker.write_bytes(frame, node)
    walker.emit(frame, walker.kernel(node.name, "vector", ops, traffic, node), node)


def _operations(walker: Walker, frame: Frame, node: Node, shape: tuple[int, ...]) -> float:
    name = node.name
    if name == "fft":  # 5 n log2 n real operations of a complex transform of n points, or half
        points = math.prod(node.params["fft_lengths"])
        rank = len(node.params["fft_lengths"])
        batch = math.prod(shape[: len(shape) - rank])
        each = 2.5 if "RFFT" in node.params["fft_type"].name else 5.0
        return each * batch * points * math.log2(max(points, 2))
    if name == "triangular_solve":  # n^2 for each right-hand side
        n = shape[-1]
        return float(n * walker.size(frame, node.outs[0]))
    if name in ("tridiagonal_solve", "lu_pivots_to_permutation"):
        return 8.0 * walker.size(frame, node.outs[0])
    if name == "cholesky_update":
        return 4.0 * math.prod(shape)
    rows, columns = shape[-2], shape[-1]
    return CUBIC[name] * math.prod(shape[:-2]) * max(rows, columns) * min(rows, columns) ** 2


LINEAR = (
    *CUBIC,
    "fft",
    "triangular_solve",
    "tridiagonal_solve",
    "lu_pivots_to_permutation",
    "cholesky_update",
)
