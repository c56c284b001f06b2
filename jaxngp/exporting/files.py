"""Files of triangles and points: PLY, OBJ and glTF binaries, as arrays become them."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxngp.data import SceneTransform
from jaxngp.records import replacing

_TYPES = {"f4": "float", "f8": "double", "u1": "uchar", "i4": "int"}
_COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}  # glTF's names of dtypes
_SHAPES = {0: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}
ARRAY, ELEMENT = 34962, 34963  # what a buffer view holds: vertices, or their numbers
LINEAR, CLAMP = 9729, 33071  # how a texture is read
UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # glTF's y is up, a scene's is z


def linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light of sRGB values in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_byte(rgb: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as u8."""
    return np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def positions(points: np.ndarray, side: float) -> np.ndarray:
    """Points (N, 3) in f32, or in f64 where that is too coarse for a scene of this side so far from the origin."""
    return points.astype(np.float64 if np.abs(points).max(initial=0) > 2**10 * side else np.float32)


def write_ply(path: Path, columns: dict[str, np.ndarray], faces: np.ndarray | None = None) -> None:
    """A binary PLY: columns (N,) by their names, in order, and triangles (F, 3)."""
    count = len(next(iter(columns.values())))
    vertices = np.empty(count, [(name, values.dtype.newbyteorder("<")) for name, values in columns.items()])
    for name, values in columns.items():
        vertices[name] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property {_TYPES[values.dtype.str[1:]]} {name}" for name, values in columns.items()]
    parts = [vertices.tobytes()]
    if faces is not None:
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        rows = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
        rows["count"], rows["corners"] = 3, faces
        parts.append(rows.tobytes())
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"\n".join([*map(str.encode, header), b"end_header\n"]) + b"".join(parts))


def axes_of(names: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of an array (N, K) by K names with spaces between."""
    return dict(zip(names.split(), values.T, strict=True))


@dataclass(frozen=True)
class Textured:
    """Colours from a texture: uv (V, 2) in [0, 1] from its upper left corner, and its PNG."""

    uv: np.ndarray
    png: bytes


def write_obj(
    path: Path, vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, colours: np.ndarray | Textured
) -> None:
    """An OBJ: with vertex colours sRGB (V, 3) after the coordinates, as most programs read them, or with a texture.

    A texture lies beside it, with the material that names it: `x.obj`, `x.mtl`, `x.png`.
    """
    text = io.StringIO()
    if isinstance(colours, Textured):
        names = {suffix: path.with_suffix(suffix).name for suffix in (".mtl", ".png")}
        material = f"newmtl scene\nKd 1 1 1\nillum 0\nmap_Kd {names['.png']}\n"
        for suffix, content in ((".mtl", material.encode("utf-8")), (".png", colours.png)):
            with replacing(path.with_suffix(suffix)) as unfinished:
                unfinished.write_bytes(content)
        text.write(f"mtllib {names['.mtl']}\nusemtl scene\n")
        np.savetxt(text, vertices, "v %.9g %.9g %.9g")
        np.savetxt(text, colours.uv * [1, -1] + [0, 1], "vt %.6f %.6f")  # its origin is the lower left corner
        corner = "%d/%d/%d"
    else:
        np.savetxt(text, np.concatenate([vertices, colours], axis=1), "v %.9g %.9g %.9g %.4f %.4f %.4f")
        corner = "%d//%d"
    np.savetxt(text, normals, "vn %.4f %.4f %.4f")
    np.savetxt(text, np.repeat(faces + 1, corner.count("d"), axis=1), f"f {corner} {corner} {corner}")
    with replacing(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8")


class Glb:
    """A glTF 2.0 binary of one mesh, put together array by array.

    Vertices are relative to the middle of the scene's box, where f32 is finest. A node puts them where they are in the
    source, turned so that what is up in the scene is glTF's y.
    """

    def __init__(self, transform: SceneTransform) -> None:
        from scipy.spatial.transform import Rotation

        self._middle = np.array(transform.centre)
        turn = UP @ np.array(transform.rotation)
        node = {
            "mesh": 0,
            "rotation": Rotation.from_matrix(turn).as_quat().tolist(),
            "translation": (turn @ self._middle).tolist(),
        }
        self.json: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "jaxngp"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [node],
            "accessors": [],
            "bufferViews": [],
        }
        self._parts: list[bytes] = []
        self._length = 0

    def view(self, content: bytes, **more: Any) -> int:
        """The number of a new buffer view."""
        self._parts.append(content + b"\0" * (-len(content) % 4))
        views: list[Any] = self.json["bufferViews"]
        views.append({"buffer": 0, "byteOffset": self._length, "byteLength": len(content), **more})
        self._length += len(self._parts[-1])
        return len(views) - 1

    def array(self, values: np.ndarray, *, normalised: bool = False, target: int = ARRAY, **more: Any) -> int:
        """The number of a new accessor to values (N,) or (N, K), of which a row must be a multiple of 4 bytes."""
        shape = _SHAPES[values.shape[1] if values.ndim == 2 else 0]
        accessor = {
            "bufferView": self.view(np.ascontiguousarray(values).tobytes(), target=target),
            "componentType": _COMPONENTS[values.dtype.str[1:]],
            "count": len(values),
            "type": shape,
            **({"normalized": True} if normalised else {}),
            **more,
        }
        self.json["accessors"].append(accessor)
        return len(self.json["accessors"]) - 1

    def positions(self, points: np.ndarray) -> int:
        """The accessor of points (N, 3) in the coordinates of the source."""
        own = (points - self._middle).astype(np.float32)
        return self.array(own, min=own.min(axis=0).tolist(), max=own.max(axis=0).tolist())

    def colours(self, srgb: np.ndarray, alpha: np.ndarray | None = None) -> int:
        """The accessor of vertex colours (N, 3), which glTF has in linear light; with opacities (N,) where given."""
        rgba = np.concatenate([linear(srgb), (np.ones(len(srgb)) if alpha is None else alpha)[:, None]], axis=1)
        return self.array(np.round(rgba.clip(0, 1) * 65535).astype(np.uint16), normalised=True)

    def texture(self, png: bytes) -> int:
        """The number of a new texture; smoothed, but without mipmaps, which would mix the charts of an atlas."""
        images: list[Any] = self.json.setdefault("images", [])
        images.append({"bufferView": self.view(png), "mimeType": "image/png"})
        self.json["samplers"] = [{"magFilter": LINEAR, "minFilter": LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}]
        self.json.setdefault("textures", []).append({"sampler": 0, "source": len(images) - 1})
        return len(self.json["textures"]) - 1

    def faces(self, faces: np.ndarray) -> int:
        """The accessor of the corners of triangles (F, 3)."""
        return self.array(faces.ravel().astype(np.uint32), target=ELEMENT)

    def write(self, path: Path) -> None:
        """Write the file."""
        described = self.json | {"buffers": [{"byteLength": self._length}]}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        content = b"".join(self._parts)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(content), b"BIN\0") + content
        with replacing(path) as unfinished:
            unfinished.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
