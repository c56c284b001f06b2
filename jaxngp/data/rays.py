"""Ray tables: N rows of origin, direction and rgb in a `.npy`, `.npz` or pickled array.

Nothing that a file asks for is run: a pickle is read as the description of one numpy array, by an unpickler that
knows no other object.
"""

from __future__ import annotations

import pickle
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tqdm import tqdm

from jaxngp.cameras import Rays
from jaxngp.config import MAX_LENGTH, InputError, shown

SUFFIXES = (".npy", ".npz", ".pkl")
SIZE_ADVICE = "put WIDTHxHEIGHT into the file's name (test_800x800.npy), or an entry 'size' into the .npz"
MIN_NORM = 1e-6  # of a direction, before it is normalised
RGB_TOLERANCE = 1e-3  # by which a colour may leave [0, 1] before it is clipped instead of refused
MAX_COMPRESSION = 200  # bytes out per byte in; rays compress less than tenfold, an archive made to fill the memory more
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

    def cast(self, row: jax.Array, _: jax.Array) -> Rays:
        """The rays (R,) of rows (R,) i32."""
        return self.rays[row]


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
        raise InputError(f"{path}: no ray table ({reason}); expected an (N, 9) array of floats") from None
    if not isinstance(rows, np.ndarray):  # what in an archive is no .npy comes as its bytes
        raise InputError(f"{path}: 'rays' is no array: expected an (N, 9) array of floats; export it in that form")
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


class _Named:
    """One of the few names that the pickle of an array uses. Calling it only notes the arguments."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> _Call:
        return _Call(self.name, args)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError(f"the pickle changes {self.name}")


@dataclass
class _Call:
    """A call in a pickle, and the state that the pickle gives its result."""

    name: str
    args: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_NAMES = {
    ("numpy", "ndarray"): _Named("ndarray"),
    ("numpy", "dtype"): _Named("dtype"),
    ("_codecs", "encode"): _Named("encode"),  # protocols 0 to 2 spell bytes as latin-1 text
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Named("_reconstruct") for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Named("_frombuffer") for core in ("core", "_core")},  # protocol 5
}
# What numpy's pickles of protocols 0 to 5 are made of. No lists, sets or dicts: hashing nested keys can exhaust the
# C stack. No instances, no extension registry, no persistent ids.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
    *(pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.MARK, pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.LONG, pickle.LONG1),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
)


class _Handlers(dict[int, Any]):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"refused: the pickle holds something other than a numpy array (opcode {code:#x})")


class _ArrayUnpickler(pickle._Unpickler):
    """Reads a pickle as nested `_Call`s; nothing that it names is imported, called or changed.

    It is Python's unpickler in Python, not the one in C: that one sizes its memo by the largest index in the file,
    so five bytes can ask it for 34 GB.
    """

    dispatch = _Handlers({opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _OPCODES})
    # The same bytes follow both; but a bytearray of the length named is cleared in memory before any of it is read.
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"refused: the pickle asks for {f'{module}.{name}'!r}")
        return _NAMES[module, name]


def _read_pickle(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        call = _ArrayUnpickler(file).load()
    if isinstance(call, _Call) and call.name == "_reconstruct":
        _, shape, dtype, fortran, data = call.state
        order: Literal["C", "F"] = "F" if fortran else "C"
    elif isinstance(call, _Call) and call.name == "_frombuffer":
        data, dtype, shape, order = call.args
    else:
        raise pickle.UnpicklingError("the pickle holds something other than a numpy array")
    if isinstance(data, _Call) and data.name == "encode" and data.args[1] == "latin1":
        data = data.args[0].encode("latin1")
    if not isinstance(data, bytes):  # the elements of an object array come as a list
        raise pickle.UnpicklingError("the array holds Python objects")
    array: np.ndarray = np.frombuffer(data, _pickled_dtype(dtype))
    return array.reshape(shape, order=order)


def _pickled_dtype(dtype: _Call) -> np.dtype[Any]:
    code, order = dtype.args[0], dtype.state[1]
    if dtype.name != "dtype" or code not in ("f2", "f4", "f8") or order not in ("<", ">"):
        raise pickle.UnpicklingError(f"the array is of dtype {shown(code)}")
    return np.dtype(order + code)


# Checking and converting.


def count_views(path: Path, rows: np.ndarray, size: tuple[int, int]) -> int:
    """How many views of the given (width, height) the rows make; 0 where the size is unknown."""
    if not all(size):
        return 0
    if len(rows) % (size[0] * size[1]):
        raise InputError(
            f"{path}: {len(rows)} rows are no whole number of {size[0]}x{size[1]} views; "
            "correct the size in the file's name or export the table again"
        )
    return len(rows) // (size[0] * size[1])


def make_ray_table(path: Path, rows: np.ndarray, size: tuple[int, int], views: np.ndarray) -> RayTable:
    """The given views of a table, or all its rows where the size is unknown; origins stay in the file's units.

    Raises InputError for the first row that is not finite, has no direction, or a colour outside [0, 1].
    """
    pixels = size[0] * size[1]
    ranges = [(view * pixels, (view + 1) * pixels) for view in views.tolist()] if pixels else [(0, len(rows))]
    origin, direction, rgb = (np.empty((sum(end - start for start, end in ranges), 3), np.float32) for _ in range(3))
    filled = 0
    for start, end in tqdm([*_chunks(ranges)], path.name, delay=1.0, disable=None, leave=False):
        with np.errstate(all="ignore"):  # the cast warns of a signalling NaN, which the check then refuses
            part = _checked(path, np.asarray(rows[start:end], np.float64), start)
        to = slice(filled, filled + end - start)
        origin[to] = part[:, :3]
        direction[to] = part[:, 3:6] / np.linalg.norm(part[:, 3:6], axis=1, keepdims=True)
        rgb[to] = part[:, 6:].clip(0, 1)
        filled = to.stop
    return RayTable(rays=Rays(origin=origin, direction=direction), rgb=rgb, width=size[0], height=size[1])  # type: ignore[arg-type]


def _chunks(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for first, last in ranges:
        yield from ((start, min(start + CHUNK, last)) for start in range(first, last, CHUNK))


def _checked(path: Path, part: np.ndarray, start: int) -> np.ndarray:
    """`part` (M, 9) f64, rows `start` and on of a table, if all of it is sound."""
    faults = (
        (~(np.abs(part) <= MAX_LENGTH).all(axis=1), "is not finite"),
        (~(np.abs(part[:, 3:6]).max(axis=1) >= MIN_NORM), "has no direction (columns 3-5 are 0)"),
        (~(np.abs(part[:, 6:] - 0.5) <= 0.5 + RGB_TOLERANCE).all(axis=1), "has a colour outside [0, 1] (columns 6-8)"),
    )
    for faulty, fault in faults:
        if faulty.any():
            raise InputError(f"{path}: row {start + int(faulty.argmax())} {fault}; export the table again")
    return part
