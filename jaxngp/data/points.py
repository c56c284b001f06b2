"""The vertices of a `.ply`: the points that structure from motion, or a scanner, found."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxngp.config import InputError

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
MAX_HEADER = 2**16  # bytes


def read_ply_points(path: Path) -> np.ndarray:
    """The positions (N, 3) f64 of the vertices, without those that are not finite. Raises InputError."""
    try:
        with path.open("rb") as file:
            head = file.read(MAX_HEADER)
            end = head.index(b"end_header")
            end = head.index(b"\n", end) + 1
            order, count, fields = _header(head[:end].decode("ascii").split("\n"))
            file.seek(end)
            if order:
                dtype = np.dtype([(name, order + kind) for name, kind in fields])
                content = file.read(count * dtype.itemsize)
                table = np.frombuffer(content, dtype, count)
                points = np.stack([table[axis] for axis in "xyz"], axis=1).astype(np.float64)
            else:
                names = [name for name, _ in fields]
                lines = [line.split() for line, _ in zip(file, range(count), strict=False)]
                points = np.array([[float(line[names.index(axis)]) for axis in "xyz"] for line in lines]).reshape(-1, 3)
                if len(points) != count:
                    raise ValueError("it ends early")
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a point cloud ({error}); export it again as a PLY") from None
    return points[np.isfinite(points).all(axis=1)]


def _header(lines: list[str]) -> tuple[str, int, list[tuple[str, str]]]:
    """Byte order ("" for text), number of vertices, and their properties in order."""
    words = [line.split() for line in lines]
    if words[0] != ["ply"]:
        raise ValueError("it does not begin with 'ply'")
    formats = [_ORDER[w[1]] for w in words if w[:1] == ["format"]]
    elements = [i for i, w in enumerate(words) if w[:1] == ["element"]]
    if not formats or not elements or words[elements[0]][1] != "vertex":
        raise ValueError("it has no format, or its first element is not 'vertex'")
    last = elements[1] if len(elements) > 1 else len(words)
    own = [w for w in words[elements[0] + 1 : last] if w[:1] == ["property"]]
    return formats[0], int(words[elements[0]][2]), [(w[2], _TYPES[w[1]]) for w in own]
