"""Computes the products of `inputs.npz`, which lies beside this file, on a device.

    python run_probe.py [--backend BACKEND]

Needs NumPy, and PyTorch for every backend but `numpy`. It writes `outputs.npz` beside itself; then
`cm384 probe --read FOLDER`, on any machine, says which arithmetic the device has. The results
should be FP32 sums; where a backend only gives BF16 they are taken rounded, and say less.

To use another library, replace `multiply`: it gets the words of A and B and returns those of A @ B.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from typing import Any

import numpy as np

BACKENDS = ("torch-npu", "torch-cuda", "torch-cpu", "numpy")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: the first that is there")
    backend = parser.parse_args().backend or choose()
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(folder, "inputs.npz")
    with open(path, "rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
    with np.load(path) as inputs:
        tiles = json.loads(str(inputs["tiles"]))
        dtype = str(inputs["dtype"])
        operands = [(inputs[f"a{k}"], inputs[f"b{k}"]) for k in range(len(tiles))]
    outputs: dict[str, Any] = {}
    results: set[str] = set()
    for number, (a, b) in enumerate(operands):
        outputs[f"d{number}"], result = multiply(a, b, dtype, backend)
        results.add(result)
    if len(results) != 1:
        raise SystemExit(f"{backend}: results of several types: {sorted(results)}")
    about = {"backend": backend, "result": results.pop(), "inputs": checksum}
    part = os.path.join(folder, "outputs.npz.part")
    with open(part, "wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **outputs)
    os.replace(part, os.path.join(folder, "outputs.npz"))
    print(f"{len(tiles)} products by {backend}, {about['result']} results, are in outputs.npz")
    if about["result"] != "float32":
        print("These are rounded sums: some parameters will stay ambiguous.")
    print(f"Next: cm384 probe --read {folder}")


if __name__ == "__main__":
    main()
