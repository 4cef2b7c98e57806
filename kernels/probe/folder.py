"""Probes as files: products to compute on a device without JAX, and what it answered.

A probe folder holds `inputs.npz` (operands as words), `run_probe.py` (NumPy, and PyTorch where the
device needs it) and, once that has run, `outputs.npz`.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.probe import inputs, shapes
from kernels.probe.answers import RESULTS, Answers, words_of
from kernels.probe.inputs import Tile

_FAMILY = "cm384 probe"
_FORMAT = f"{_FAMILY} 4"
_INPUTS, _OUTPUTS, _SCRIPT = "inputs.npz", "outputs.npz", "run_probe.py"


def write(folder: str | os.PathLike[str], *, dtype: str = "bfloat16", force: bool = False) -> Path:
    """Writes the probes and the script that runs them; answers of an earlier run are removed.

    Raises:
        ValueError: the folder holds something else or a changed script and `force` is not set; a
            folder lies where a file belongs; or an unknown `dtype`.
        OSError: it cannot be written.
    """
    if dtype not in inputs.DTYPES:
        raise ValueError(f"probe: dtype must be bfloat16 or float16, got {dtype!r}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the probes")
    script = Path(__file__).with_name(_SCRIPT)
    _check_place(folder, script, force)
    folder.mkdir(parents=True, exist_ok=True)
    tiles = [*inputs.tiles(dtype, with_c=False), *shapes.tiles(dtype)]
    arrays: dict[str, Any] = {
        "format": np.array(_FORMAT),
        "dtype": np.array(dtype),
        "tiles": np.array(json.dumps([_about(tile) for tile in tiles])),
    }
    for number, tile in enumerate(tiles):
        arrays[f"a{number}"] = np.ascontiguousarray(tile.a).view(np.uint16)
        arrays[f"b{number}"] = np.ascontiguousarray(tile.b).view(np.uint16)
    with tempfile.TemporaryDirectory(prefix=".probe", dir=folder) as part:
        np.savez_compressed(Path(part) / _INPUTS, **arrays)
        shutil.copyfile(script, Path(part) / _SCRIPT)
        (folder / _OUTPUTS).unlink(missing_ok=True)
        for name in (_SCRIPT, _INPUTS):
            os.replace(Path(part) / name, folder / name)
    return folder


def _check_place(folder: Path, script: Path, force: bool) -> None:
    """Refuses to write where something would be lost, before anything is written."""
    if not folder.exists():
        return
    for name in (_INPUTS, _SCRIPT, _OUTPUTS):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder; remove it, or name another one")
    if force or not any(folder.iterdir()):
        return
    if (folder / _SCRIPT).is_file():
        if (folder / _SCRIPT).read_bytes() != script.read_bytes():
            raise ValueError(
                f"{folder / _SCRIPT} is not the script that would be written; keep it elsewhere if "
                "it was changed for a device, then add --force"
            )
    elif not _is_ours(folder / _INPUTS):
        raise ValueError(
            f"{folder} is not empty and not a probe folder; name another one, or add --force"
        )


def _is_ours(path: Path) -> bool:
    """Whether these are probes, of this version or another."""
    try:
        return str(_arrays(path).get("format")).startswith(_FAMILY)
    except ValueError:
        return False


def _about(tile: Tile) -> dict[str, Any]:
    return {"name": tile.name, "group": tile.group, "thorough": tile.thorough}


def _may_be_refused(tile: Tile) -> bool:
    """The script goes on when the device refuses infinities, or another shape."""
    return tile.group in ("specials", *shapes.GROUPS)


def read(folder: str | os.PathLike[str]) -> Answers:
    """The probes of a folder and what the device answered.

    Raises:
        FileNotFoundError: no probe folder, or the script has not been run there.
        ValueError: a damaged file; the message names it and what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / _INPUTS).is_file():
        raise FileNotFoundError(
            f"{folder} is not a probe folder: it has no {_INPUTS}; "
            f"`cm384 probe --write {folder}` makes one"
        )
    if not (folder / _OUTPUTS).is_file():
        raise FileNotFoundError(
            f"{folder} has no {_OUTPUTS}: run `python {folder / _SCRIPT}` on the device first"
        )
    dtype, tiles = _tiles(folder / _INPUTS)
    outputs = _arrays(folder / _OUTPUTS)
    about = _json(outputs, "about", folder / _OUTPUTS)
    checksum = hashlib.sha256((folder / _INPUTS).read_bytes()).hexdigest()
    if not isinstance(about, dict) or about.get("inputs") != checksum:
        raise ValueError(
            f"{folder / _OUTPUTS} belongs to other inputs than {_INPUTS} holds now; "
            f"run {_SCRIPT} again"
        )
    result = about.get("result")
    if not isinstance(result, str) or result not in RESULTS:
        raise ValueError(
            f"{folder / _OUTPUTS}: expected results in {', '.join(RESULTS)}, got {result!r}"
        )
    refused, changed = _remarks(about, tiles, folder / _OUTPUTS)
    asked, words = [], []
    for number, tile in enumerate(tiles):
        if number in refused:
            continue
        shape = tile.a.shape[0], tile.b.shape[1]
        found = outputs.get(f"d{number}")
        stored = np.uint32 if result == "float32" else np.uint16
        where = f"{folder / _OUTPUTS}, probe {number} ({tile.name})"
        if found is None:
            raise ValueError(f"{where} is missing; run {_SCRIPT} again")
        if found.dtype != stored or found.shape != shape:
            raise ValueError(
                f"{where}: expected {np.dtype(stored)} words of shape {shape}, "
                f"got {found.dtype} of shape {found.shape}"
            )
        asked.append(tile)
        words.append(words_of(found.view(RESULTS[result]), shape, where)[1])
    _check_answers(words, folder / _OUTPUTS)
    return Answers(
        dtype,
        result,
        asked,
        words,
        not_asked=tuple(f"{tiles[number].name} ({why})" for number, why in refused.items()),
        unsteady=tiles[changed[0]].name if changed else None,
    )


def _remarks(
    about: dict[str, Any], tiles: list[Tile], path: Path
) -> tuple[dict[int, str], list[int]]:
    """Which products the device refused and why, and which it answered differently when asked
    again.
    """
    refused, changed = about.get("refused", {}), about.get("changed", [])
    numbers = [str(number) for number in range(len(tiles))]
    for name, kind, found in (("refused", dict, refused), ("changed", list, changed)):
        if not isinstance(found, kind) or not all(str(number) in numbers for number in found):
            raise ValueError(
                f"{path} is damaged: {name!r} names other probes than 0 to {len(tiles) - 1}, "
                f"got {found!r}; run {_SCRIPT} again"
            )
    for number in refused:
        if not _may_be_refused(tiles[int(number)]):
            raise ValueError(
                f"{path}: the device refused probe {number} ({tiles[int(number)].name}): "
                f"{refused[number]}; only infinities, NaNs and other shapes may be left out"
            )
    return {int(number): str(why) for number, why in refused.items()}, [int(x) for x in changed]


def _check_answers(words: list[NDArray[np.int64]], path: Path) -> None:
    """Refuses words that no products can have."""
    if all((x == x.flat[0]).all() for x in words):
        raise ValueError(
            f"{path}: every result is the same number: the device computed nothing; "
            f"run {_SCRIPT} again"
        )


def _tiles(path: Path) -> tuple[str, list[Tile]]:
    arrays = _arrays(path)
    if str(arrays.get("format")) != _FORMAT:
        raise ValueError(
            f'{path}: expected the format "{_FORMAT}", got "{arrays.get("format")}"; write '
            f"the probes again with this version: cm384 probe --write {path.parent} --force"
        )
    dtype = str(arrays.get("dtype"))
    if dtype not in inputs.DTYPES:
        raise ValueError(f"{path}: expected operands in bfloat16 or float16, got {dtype}")
    kind = inputs.DTYPES[dtype]
    tiles = []
    entries = _json(arrays, "tiles", path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is damaged: its list of probes is {entries!r}")
    for number, entry in enumerate(entries):
        operands = [arrays.get(f"{which}{number}") for which in "ab"]
        for which, x in zip("ab", operands, strict=True):
            if x is None or x.dtype != np.uint16 or x.ndim != 2:
                raise ValueError(f"{path}: {which}{number} is missing or not a matrix of words")
        a, b = operands
        assert a is not None and b is not None
        if a.shape[1] != b.shape[0] or not a.size or not b.size:
            raise ValueError(f"{path}: shapes {a.shape} and {b.shape} of probe {number} do not fit")
        _check_entry(entry, number, path)
        tiles.append(Tile(a=a.view(kind), b=b.view(kind), **entry))
    for number, tile in enumerate(tiles):
        if tile.group == "large" and (len(tile.a) % 4 or tile.b.shape[1] % 4):
            raise ValueError(
                f"{path} is damaged: expected rows and columns in fours of probe {number} "
                f"({tile.name}), got {tile.a.shape} @ {tile.b.shape}"
            )
    groups = [*inputs.GROUPS, *shapes.GROUPS]
    missing = [group for group in groups if group not in {tile.group for tile in tiles}]
    unknown = [tile.group for tile in tiles if tile.group not in groups]
    if missing or unknown:
        what = f"probes of the group {missing[0]!r} are missing" if missing else ""
        raise ValueError(
            f"{path} is damaged: {what or f'there is no group {unknown[0]!r} of probes'}; write "
            f"the probes again: cm384 probe --write {path.parent}"
        )
    return dtype, tiles


def _check_entry(entry: Any, number: int, path: Path) -> None:
    expected = {"name": str, "group": str, "thorough": bool}
    fits = isinstance(entry, dict) and entry.keys() == expected.keys()
    if not fits or not all(isinstance(entry[name], kind) for name, kind in expected.items()):
        raise ValueError(
            f"{path} is damaged: expected name, group and thorough (true or false) of probe "
            f"{number}, got {entry!r}; write the probes again: cm384 probe --write {path.parent}"
        )


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is cut short, or no archive of arrays")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except Exception as error:  # NumPy, zipfile and zlib each have their own
        raise ValueError(f"{path} is damaged: {error}") from error


def _json(arrays: dict[str, Any], name: str, path: Path) -> Any:
    try:
        return json.loads(str(arrays[name]))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: its entry {name!r} is missing or unreadable"
        ) from error
