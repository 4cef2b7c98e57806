"""Computes the products of `inputs.npz`, which lies beside this file, on a device.

    python run_probe.py [--backend BACKEND]

Needs NumPy, and PyTorch for every backend but `numpy`. It writes `outputs.npz` beside itself; then
`cm384 probe --read FOLDER`, on any machine, says which arithmetic the device has. The results
should be FP32 sums; where a backend only gives BF16 they are taken rounded, and say less.

To use another library, replace `multiply`: it gets the words of A and B and returns those of A @ B.
"""

from __future__ import annotations  # for the older Pythons that devices may have

import argparse
import hashlib
import importlib
import json
import os
import sys
from typing import Any

import numpy as np

BACKENDS = ("torch-npu", "torch-cuda", "torch-cpu", "numpy")
WORDS = {"float32": "uint32", "bfloat16": "uint16", "float16": "uint16"}  # type of the results
OPTIONAL = ("specials", "odd", "long", "single", "large")  # products that a device may refuse


def torch_device(backend: str) -> str:
    """The device's name for PyTorch; raises where it is not there."""
    torch = importlib.import_module("torch")
    if backend == "torch-npu":
        importlib.import_module("torch_npu")
        if not torch.npu.is_available():
            raise RuntimeError("torch_npu sees no NPU")
        return "npu"
    if backend == "torch-cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no CUDA device")
        return "cuda"
    return "cpu"


def multiply_torch(a: Any, b: Any, dtype: str, device: str) -> tuple[Any, str]:
    """A @ B by PyTorch: FP32 results where it gives them."""
    torch = importlib.import_module("torch")
    kind = getattr(torch, dtype)
    a, b = (torch.from_numpy(x.view(np.int16).copy()).view(kind).to(device) for x in (a, b))
    try:
        product = torch.mm(a, b, out_dtype=torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):
        product = torch.mm(a, b)
    product = product.cpu()
    if product.dtype == torch.float32:
        return product.numpy().view(np.uint32), "float32"
    return product.view(torch.int16).numpy().view(np.uint16), dtype


def multiply_numpy(a: Any, b: Any, dtype: str) -> tuple[Any, str]:
    """A @ B by NumPy in FP32: no matrix unit, but it shows that everything works."""
    if dtype == "bfloat16":
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    else:
        a, b = (x.view(np.float16).astype(np.float32) for x in (a, b))
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(a @ b).view(np.uint32), "float32"


def multiply(a: Any, b: Any, dtype: str, backend: str) -> tuple[Any, str]:
    """The words of A @ B, and the type of the results."""
    if backend == "numpy":
        return multiply_numpy(a, b, dtype)
    return multiply_torch(a, b, dtype, torch_device(backend))


def choose() -> str:
    """The first backend that works; what kept the others from working goes to standard error."""
    for backend in BACKENDS:
        try:
            if backend != "numpy":
                torch_device(backend)
            return backend
        except Exception as error:
            print(f"{backend}: not here ({error})", file=sys.stderr)
    raise AssertionError("numpy is always there")


def read_inputs(path: str) -> tuple[list[dict[str, Any]], str, list[tuple[Any, Any]]]:
    """What is asked: names and groups, the type of the operands, and their words."""
    try:
        with np.load(path, allow_pickle=False) as inputs:
            tiles = json.loads(str(inputs["tiles"]))
            dtype = str(inputs["dtype"])
            return tiles, dtype, [(inputs[f"a{k}"], inputs[f"b{k}"]) for k in range(len(tiles))]
    except Exception as error:
        raise SystemExit(f"{path} is missing or damaged ({error}); copy it again") from error


def answer(
    tiles: list[dict[str, Any]], operands: list[tuple[Any, Any]], dtype: str, backend: str
) -> tuple[dict[int, Any], set[str], dict[int, str]]:
    """The words of the products, the types of the results, and which products were refused."""
    outputs: dict[int, Any] = {}
    results: set[str] = set()
    refused: dict[int, str] = {}
    for number, tile in enumerate(tiles):
        a, b = operands[number]
        try:
            words, result = multiply(a, b, dtype, backend)
            check(words, result, (a.shape[0], b.shape[1]), f"probe {number} ({tile['name']})")
        except Exception as error:
            if tile["group"] not in OPTIONAL:
                raise SystemExit(
                    f"{backend} failed at probe {number} ({tile['name']}, {a.shape} @ {b.shape} in "
                    f"{dtype}): {error}"
                ) from error
            print(f"{tile['name']}: refused ({error})", file=sys.stderr)
            refused[number] = str(error)
            continue
        outputs[number] = words
        results.add(result)
    return outputs, results, refused


def check(words: Any, result: Any, shape: tuple[int, int], where: str) -> None:
    """Refuses what a `multiply` of one's own may return by mistake."""
    if result not in WORDS:
        raise SystemExit(
            f"{where}: expected the type of the results to be {', '.join(WORDS)}, got {result!r}"
        )
    dtype = getattr(words, "dtype", type(words).__name__)
    if dtype != WORDS[result]:
        raise SystemExit(
            f"{where}: expected {result} results as an array of {WORDS[result]} words, "
            f"got {dtype}; x.view(numpy.{WORDS[result]}) gives the words of such an array x"
        )
    if words.shape != shape:
        raise ValueError(f"expected results of shape {shape}, got {words.shape}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: the first that is there")
    backend = parser.parse_args().backend or choose()
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(folder, "inputs.npz")
    for name in ("outputs.npz", "outputs.npz.part"):
        if os.path.isdir(os.path.join(folder, name)):
            raise SystemExit(f"{os.path.join(folder, name)} is a folder; remove it")
    tiles, dtype, operands = read_inputs(path)
    with open(path, "rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
    print(f"{len(tiles)} products by {backend}, twice ...", flush=True)
    outputs, results, refused = answer(tiles, operands, dtype, backend)
    again, _, _ = answer(tiles, operands, dtype, backend)
    if len(results) != 1:
        raise SystemExit(f"{backend}: results of several types: {sorted(results)}")
    changed = [k for k, x in outputs.items() if k not in again or (x != again[k]).any()]
    about = {
        "backend": backend,
        "result": results.pop(),
        "inputs": checksum,
        "refused": refused,
        "changed": changed,
    }
    save(os.path.join(folder, "outputs.npz"), about, outputs)
    print(f"{len(outputs)} products by {backend}, {about['result']} results, are in outputs.npz")
    if changed:
        print(f"{len(changed)} of them had other bits the second time: no fixed arithmetic.")
    if about["result"] != "float32":
        print("These are rounded sums: some parameters will stay ambiguous.")
    if backend == "numpy":
        print("NumPy has no matrix unit; give --backend for another one.")
    print(f"Next: cm384 probe --read {folder}")


def save(path: str, about: dict[str, Any], outputs: dict[int, Any]) -> None:
    """Writes all or nothing."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            words = {f"d{number}": x for number, x in outputs.items()}
            np.savez_compressed(file, about=np.array(json.dumps(about)), **words)
        os.replace(part, path)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written: {error}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


if __name__ == "__main__":
    main()
