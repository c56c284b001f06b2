"""The format of ray tables: N rows of origin, direction and rgb in a `.npy`, `.npz` or pickled array.

Nothing that a file asks for is run: a pickle is read as the description of one numpy array.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

from jaxngp.cameras import Rays
from jaxngp.config import MAX_LENGTH, InputError, shown
from jaxngp.data.capture import SPLITS, Capture, RayRows, SceneTransform

SUFFIXES = (".npy", ".npz", ".pkl")
SIZE_ADVICE = "put WIDTHxHEIGHT into the file's name (test_800x800.npy), or an entry 'size' into the .npz"
MIN_NORM = 1e-6  # of a direction, before it is normalised
RGB_TOLERANCE = 1e-3  # by which a colour may leave [0, 1] before it is refused instead of clipped
MAX_COMPRESSION = 200  # bytes out per byte in; rays compress less than tenfold, an archive made to fill the memory more
MAX_OPCODES = 1000  # of a pickle; an array has less than a hundred
CHUNK = 2**18  # rows converted at a time


@struct.dataclass
class RayTable:
    """N rays and the colours they see; consecutive blocks of height * width rows are views.

    The directions of a file are normalised when it is loaded, so that t is a distance as everywhere else. Where a
    file's image size is unknown, width and height are 0 and its rows are only rays.
    """

    rays: Rays  # origin (N, 3) in scene units, direction (N, 3), f32
    rgb: jax.Array  # (N, 3) f32 in [0, 1]
    width: int = struct.field(pytree_node=False)
    height: int = struct.field(pytree_node=False)

    @property
    def num_pixels(self) -> int:
        return self.rgb.shape[0]

    @property
    def source(self) -> RayTable:
        """Where the rays of its pixels come from."""
        return self

    def pixel(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of rows by their numbers (R,) i32: the row itself, no place in a picture, and opaque rgba (R, 4) f32."""
        count = len(number)
        rgba = jnp.concatenate([self.rgb[number], jnp.ones((count, 1), jnp.float32)], axis=1)
        return number, jnp.zeros((count, 2), jnp.float32), rgba

    def pixel_depth(self, number: jax.Array) -> None:
        """A table has no depths."""
        del number

    def cast(self, row: jax.Array, _: jax.Array) -> Rays:
        """The rays (R,) of rows (R,) i32."""
        return self.rays[row]


def detect(path: Path) -> tuple[str, ...]:
    """Which of train, val and test a path has a table of."""
    return tuple(split for split in SPLITS if split in find_tables(path))


def read(path: Path, splits: tuple[str, ...]) -> Capture:
    """The views of the given splits; a `.npy` is mapped, not read. Raises InputError."""
    tables = find_tables(path)
    blocks = {split: _views_of(tables[split]) for split in splits}
    views = [(split, f"view_{i}") for split in splits for i, block in enumerate(blocks[split]) if any(block.size)]
    return Capture(
        path=path,
        names=tuple(name for _, name in views),
        splits=tuple(split for split, _ in views),
        rays=tuple(block for split in splits for block in blocks[split]),
    )


def _views_of(path: Path) -> list[RayRows]:
    """The rows of each view of a table, or all rows where the image size is unknown."""
    rows, size = read_ray_table(path)
    pixels = size[0] * size[1] or len(rows)
    if len(rows) % pixels:
        raise InputError(
            f"{path}: {len(rows)} rows are not a whole number of {size[0]}x{size[1]} views; "
            "correct the size in the file's name or export the table again"
        )
    return [RayRows(path, rows[first : first + pixels], first, size) for first in range(0, len(rows), pixels)]


# Which files.

_TABLE_NAME = re.compile(r"(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?)(?![a-z])(.*)", re.IGNORECASE)


def find_tables(path: Path) -> dict[str, Path]:
    """The tables at a path, by split (train, val, test).

    A file brings its siblings with it: `training_data_800x800.pkl` has `testing_data_800x800.pkl`, `train.npy` has
    `test.npy` and `val.npy`. A folder may hold one table of each split. A file of another name is a train table.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            return {}
        split, rest = _split_of(path)
        siblings = [file for file in _table_files(path.parent) if _split_of(file)[1] == rest and rest is not None]
        same_suffix = [file for file in siblings if file.suffix == path.suffix]
        found = {_split_of(file)[0] or "": file for file in siblings + same_suffix}  # the later one counts
        return {**found, split or "train": path}
    tables: dict[str, Path] = {}
    if not path.is_dir():
        return {}
    for file in _table_files(path):
        if split := _split_of(file)[0]:
            if split in tables:
                raise InputError(f"{path}: two {split} tables, {tables[split].name} and {file.name}; give one as path")
            tables[split] = file
    return tables


def _table_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def _split_of(path: Path) -> tuple[str | None, str | None]:
    """The split that a file's name begins with, and the rest of the name; (None, None) where it begins otherwise."""
    if not (match := _TABLE_NAME.fullmatch(path.stem)):
        return None, None
    return next(name for name in match.groups()[:3] if name).lower(), match[4]


# Reading.


def read_ray_table(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """The rows (N, 9) of a table as they are stored, and (width, height) of its views or (0, 0) where unknown.

    The kind of file is told by its first bytes. A `.npy` is mapped, not read. Raises InputError, also for whatever
    is in the file and is not such an array.
    """
    size = _size_in_name(path)
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic == np.lib.format.MAGIC_PREFIX:
            rows: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # fails where the file is too short
        elif magic[:2] == b"PK":
            rows, stored = _read_npz(path)
            size = size if any(size) else stored
        else:
            rows = _read_pickle(path)
    except InputError:
        raise
    except Exception as error:  # a reader met with a broken or hostile file raises whatever it likes
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise InputError(f"{path}: not a ray table ({reason}); expected an (N, 9) array of floats") from None
    if not isinstance(rows, np.ndarray):  # numpy returns an entry that is not a .npy as bytes
        raise InputError(f"{path}: 'rays' is not an array: expected an (N, 9) array of floats; export it in that form")
    if rows.ndim != 2 or rows.shape[1] != 9 or rows.shape[0] == 0 or rows.dtype.kind != "f":
        raise InputError(
            f"{path}: holds a {rows.dtype} array of shape {rows.shape}: expected (N, 9) floats, "
            "one row of origin, direction and rgb per ray; export it in that form"
        )
    return rows, size


def _size_in_name(path: Path) -> tuple[int, int]:
    match = re.search(r"(?<!\d)([1-9]\d{0,4})x([1-9]\d{0,4})(?!\d)", path.stem)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _read_npz(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    # The file is opened here because numpy leaves it open where it is no whole archive.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        unpacked = sum(info.file_size for info in archive.zip.infolist())
        if unpacked > MAX_COMPRESSION * max(path.stat().st_size, 2**16):  # what an entry says of itself may be wrong
            raise InputError(f"{path}: unpacks to {unpacked} bytes: refused; save it again")
        width, height = _stored_size(path, archive["size"]) if "size" in archive.files else (0, 0)
        if "rays" in archive.files:
            return archive["rays"], (width, height)
        arrays = {key: archive[key] for key in archive.files if key != "size"}
    tables = [array for array in arrays.values() if array.ndim == 2 and array.shape[1] == 9]
    if len(tables) != 1:
        held = textwrap.shorten(", ".join(f"{key} {array.shape}" for key, array in arrays.items()), 200) or "nothing"
        raise InputError(f"{path}: expected an array 'rays' of shape (N, 9), found {held}; name it so")
    return tables[0], (width, height)


def _stored_size(path: Path, size: np.ndarray) -> tuple[int, int]:
    if size.shape != (2,) or size.dtype.kind not in "iu" or size.min() < 1 or size.max() > 99999:
        raise InputError(f"{path}: the entry 'size' is {shown(size.tolist())}: expected two integers, width and height")
    return int(size[0]), int(size[1])


# Pickles.


class _Dtype:
    """What a pickle says of a dtype: its code, and in its state the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """What a pickle says of an array, as the arguments of numpy's `_frombuffer` or the state for `_reconstruct`."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> None:
        self.said = data, dtype, shape, order

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.said = data, dtype, shape, "F" if fortran else "C"


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # named for _reconstruct, never called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): str.encode,  # protocols 0 to 2 spell bytes as latin-1 text
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array for core in ("core", "_core")},  # protocol 5
}
"""What the pickle of an array names, and what stands for it here. Numpy itself is not called, and what stands for it
cannot be changed by a pickle: `BUILD` on a class calls the `__setstate__` that it has."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused: the pickle asks for {f'{module}.{name}'!r}")
        return _ALLOWED[module, name]


def _read_pickle(path: Path) -> np.ndarray:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _check_opcodes(content)
        content.seek(0)
        array = _ArrayUnpickler(content).load()
    if not isinstance(array, _Array):
        raise pickle.UnpicklingError("refused: the pickle holds something other than a numpy array")
    data, dtype, shape, order = array.said
    if not isinstance(data, bytes | bytearray):  # the elements of an object array come as a list
        raise pickle.UnpicklingError("refused: the array holds Python objects")
    if not isinstance(dtype, _Dtype) or dtype.code not in ("f2", "f4", "f8") or dtype.order not in ("<", ">"):
        raise pickle.UnpicklingError(f"the array is of dtype {shown(getattr(dtype, 'code', dtype))}")
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code)).reshape(shape, order=order)


def _check_opcodes(content: mmap.mmap) -> None:
    """Refuses a pickle that is more than an array could be, or that would have the unpickler fill the memory.

    Walking through the opcodes finds lengths beyond the end of the file. The unpickler sizes its memo by the largest
    index in the file: five bytes could ask it for 34 GB.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):  # type: ignore[arg-type]
        memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if count > MAX_OPCODES or (memo and (argument or 0) > MAX_OPCODES):
            raise pickle.UnpicklingError("refused: the pickle holds more than a numpy array")


# Checking and converting.


def make_ray_table(blocks: Sequence[RayRows], transform: SceneTransform) -> RayTable:
    """The rows of all blocks, in scene units, as numpy arrays.

    Directions get unit length, so that t is a distance as everywhere else. Raises InputError for the first row that
    is not finite, has no direction, or a colour outside [0, 1].
    """
    origin, direction, rgb = (np.empty((sum(len(block.rows) for block in blocks), 3), np.float32) for _ in range(3))
    chunks = [(block, at) for block in blocks for at in range(0, len(block.rows), CHUNK)]
    filled = 0
    for block, at in tqdm(chunks, blocks[0].path.name, delay=1.0, disable=None, leave=False):
        with np.errstate(all="ignore"):  # the cast warns of a signalling NaN, which the check then refuses
            part = np.asarray(block.rows[at : at + CHUNK], np.float64)
        _check_rows(block.path, part, block.first + at)
        to = slice(filled, filled + len(part))
        origin[to] = transform.to_scene(part[:, :3])
        direction[to] = part[:, 3:6] / np.linalg.norm(part[:, 3:6], axis=1, keepdims=True)
        rgb[to] = part[:, 6:].clip(0, 1)
        filled = to.stop
    width, height = blocks[0].size
    return RayTable(rays=Rays(origin=origin, direction=direction), rgb=rgb, width=width, height=height)  # type: ignore[arg-type]


def _check_rows(path: Path, part: np.ndarray, first: int) -> None:
    """Raises InputError where a row of `part` (M, 9) f64 is unsound; `first` is the number of its first row."""
    faults = (
        (~(np.abs(part) <= MAX_LENGTH).all(axis=1), "is not finite"),
        (~(np.abs(part[:, 3:6]).max(axis=1) >= MIN_NORM), "has no direction (columns 3-5 are 0)"),
        (~(np.abs(part[:, 6:] - 0.5) <= 0.5 + RGB_TOLERANCE).all(axis=1), "has a colour outside [0, 1] (columns 6-8)"),
    )
    for faulty, fault in faults:
        if faulty.any():
            raise InputError(f"{path}: row {first + int(faulty.argmax())} {fault}; export the table again")
