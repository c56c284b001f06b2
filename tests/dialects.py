"""One capture, written as each of the formats that jaxngp reads would have it."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scenes import poses_around

LENS = {"k1": 0.08, "k2": -0.05, "p1": 0.004, "p2": -0.003}


@dataclass(frozen=True, eq=False)
class Scene:
    """Views in the order of their names, in world units."""

    c2w: np.ndarray  # (V, 3, 4) f64, OpenGL axes
    focal: np.ndarray  # (V, 2) px
    centre: np.ndarray  # (V, 2) px
    sizes: np.ndarray  # (V, 2) int, width and height
    images: list[np.ndarray]  # (H, W, 3) u8 each
    points: np.ndarray  # (N, 3)
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    @property
    def names(self) -> list[str]:
        """Of the image files, without their extension."""
        return [f"view_{i:03}" for i in range(len(self.c2w))]

    @property
    def lens(self) -> dict[str, float]:
        return {"k1": self.k1, "k2": self.k2, "p1": self.p1, "p2": self.p2}

    def project(self, view: int, points: np.ndarray) -> np.ndarray:
        """Where world points (N, 3) are in a view (N, 2), by OpenCV's formulas in float64."""
        c2w = self.c2w[view]
        x, y, z = ((points - c2w[:, 3]) @ c2w[:, :3]).T
        a, b = x / -z, y / z
        square = a * a + b * b
        radial = 1 + self.k1 * square + self.k2 * square**2
        u = a * radial + 2 * self.p1 * a * b + self.p2 * (square + 2 * a * a)
        v = b * radial + self.p1 * (square + 2 * b * b) + 2 * self.p2 * a * b
        return np.stack([u, v], axis=-1) * self.focal[view] + self.centre[view]


def small_scene(num_views: int = 10) -> Scene:
    """Views of 32x24 pixels, one of them upright, of noise; a distorted lens, and intrinsics of each view."""
    rng = np.random.default_rng(0)
    sizes = np.tile([32, 24], (num_views, 1))
    sizes[min(3, num_views - 1)] = (24, 32)
    c2w = poses_around(num_views, 3.0).astype(np.float64)
    c2w[..., :3] = [np.linalg.qr(axes)[0] * np.sign(np.diag(np.linalg.qr(axes)[1])) for axes in c2w[..., :3]]
    c2w[..., 3] = 2 * c2w[..., 3] + (0.3, -0.2, 0.1)
    return Scene(
        c2w=c2w,
        focal=rng.uniform(28, 36, (num_views, 2)),
        centre=sizes / 2 + rng.uniform(-2, 2, (num_views, 2)),
        sizes=sizes,
        images=[rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for w, h in sizes.tolist()],
        points=rng.uniform(-1, 1, (50, 3)),
        **LENS,
    )


def expressed(dialect: str, scene: Scene) -> Scene:
    """The scene as a dialect can say it: some have no lens, no principal point, or one image size for all."""
    pinhole = replace(scene, k1=0.0, k2=0.0, p1=0.0, p2=0.0)
    if dialect in ("blender", "llff"):
        square = np.repeat(scene.focal[:, :1], 2, axis=1)
        return replace(pinhole, focal=square, centre=scene.sizes / 2)
    if dialect == "record3d":
        width, height = scene.sizes[0].tolist()
        images = [np.resize(image, (height, width, 3)) for image in scene.images]
        return replace(pinhole, sizes=np.tile(scene.sizes[0], (len(images), 1)), images=images)
    return pinhole if dialect == "polycam" else scene


def write(dialect: str, folder: Path, scene: Scene) -> None:
    """Write the scene, as far as the dialect can say it, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    DIALECTS[dialect](folder, expressed(dialect, scene))


def write_images(folder: Path, scene: Scene, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(scene.names, scene.images, strict=True):
        Image.fromarray(image).save(folder / f"{name}{suffix}")


# A transforms.json.


def write_json(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain))


def _frames(scene: Scene, folder: str, suffix: str) -> list[dict[str, Any]]:
    matrices = np.concatenate([scene.c2w, np.tile([[[0, 0, 0, 1.0]]], (len(scene.c2w), 1, 1))], axis=1)
    return [
        {"file_path": f"{folder}/{name}{suffix}", "transform_matrix": matrix.tolist()}
        for name, matrix in zip(scene.names, matrices, strict=True)
    ]


def _intrinsics(scene: Scene, view: int) -> dict[str, float]:
    numbers = np.concatenate([scene.focal[view], scene.centre[view], scene.sizes[view]]).tolist()
    return dict(zip(("fl_x", "fl_y", "cx", "cy", "w", "h"), numbers, strict=True)) | scene.lens


def _blender(folder: Path, scene: Scene) -> None:
    frames = _frames(scene, "./train", "")
    for frame, (focal, _), (width, _) in zip(frames, scene.focal, scene.sizes, strict=True):
        frame["camera_angle_x"] = 2 * float(np.arctan(width / (2 * focal)))
    write_json(folder / "transforms_train.json", {"frames": frames})
    write_images(folder / "train", scene)


def _instant_ngp(folder: Path, scene: Scene) -> None:
    frames = _frames(scene, "images", ".png")
    for view, frame in enumerate(frames):
        frame |= {"sharpness": 30.0 + view, **_intrinsics(scene, view)}
    # What frames say precedes this.
    write_json(folder / "transforms.json", {"aabb_scale": 4, "fl_x": 99.0, "k1": 0.3, "frames": frames})
    write_images(folder / "images", scene)


def _nerfstudio(folder: Path, scene: Scene) -> None:
    frames = _frames(scene, "images", ".png")
    for view, frame in enumerate(frames):
        frame |= {"colmap_im_id": view + 1, **_intrinsics(scene, view)}
    for frame in frames:  # what the top says precedes these
        frame |= {"k1": 0.3, "p2": 0.3}
    applied = np.eye(3, 4).tolist()
    top = {"camera_model": "OPENCV", "applied_transform": applied, "ply_file_path": "points.ply", **scene.lens}
    write_json(folder / "transforms.json", top | {"frames": frames[::-1]})
    write_images(folder / "images", scene)
    write_ply(folder / "points.ply", scene.points)


def write_ply(path: Path, points: np.ndarray) -> None:
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "property uchar red\nend_header\n"
    rows = b"".join(struct.pack("<3fB", *point, 7) for point in points)
    path.write_bytes(header.encode() + rows)


# COLMAP.


def _world_to_camera(c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quaternion (w, x, y, z) and translation of COLMAP, whose axes are OpenCV's."""
    rotation = (c2w[:, :3] * (1, -1, -1)).T
    # The eigenvector of Bar-Itzhack's matrix.
    m = rotation
    matrix = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    quaternion = np.linalg.eigh(matrix)[1][:, -1]
    return quaternion, -rotation @ c2w[:, 3]


def _colmap_records(scene: Scene) -> list[tuple[int, list[float], int, str, list[float]]]:
    """Id, pose, camera, name and camera parameters of each image, in no order and with gaps between ids."""
    records = []
    for view, name in enumerate(scene.names):
        quaternion, translation = _world_to_camera(scene.c2w[view])
        parameters = [*scene.focal[view], *scene.centre[view], *scene.lens.values()]
        length = 1 + view % 2  # readers bring it to 1
        pose = [float(value) for value in (*(length * quaternion), *translation)]
        records.append((7 * view + 3, pose, 2 * view + 5, f"{name}.png", [float(value) for value in parameters]))
    return records[::-1]


def _colmap_text(folder: Path, scene: Scene) -> None:
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    cameras, images = ["# cameras"], ["# images"]
    for view, (key, pose, camera, name, parameters) in enumerate(_colmap_records(scene)[::-1]):
        width, height = scene.sizes[view].tolist()
        cameras.append(f"{camera} OPENCV {width} {height} {' '.join(map(repr, parameters))}")
        images += [f"{key} {' '.join(map(repr, pose))} {camera} {name}", "1.5 2.5 -1" if view % 2 else ""]
    points = [f"{i} {' '.join(map(repr, point))} 1 2 3 0.5 3 0" for i, point in enumerate(scene.points.tolist())]
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", ["# points", *points])):
        (model / f"{name}.txt").write_text("\n".join(lines) + "\n")
    write_images(folder / "images", scene)


def _colmap_binary(folder: Path, scene: Scene) -> None:
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    records = _colmap_records(scene)
    cameras, images = struct.pack("<Q", len(records)), struct.pack("<Q", len(records))
    for i, (key, pose, camera, name, parameters) in enumerate(records):
        width, height = scene.sizes[::-1][i].tolist()
        cameras += struct.pack("<IiQQ8d", camera, 4, width, height, *parameters)
        seen = i % 3
        images += struct.pack("<I7dI", key, *pose, camera) + name.encode() + b"\0"
        images += struct.pack("<Q", seen) + struct.pack("<2dQ", 1.5, 2.5, 2**64 - 1) * seen
    points = struct.pack("<Q", len(scene.points))
    for i, point in enumerate(scene.points.tolist()):
        points += struct.pack("<Q3d3BdQ", i, *point, 1, 2, 3, 0.5, i % 2) + struct.pack("<II", 3, 0) * (i % 2)
    for kind, content in (("cameras", cameras), ("images", images), ("points3D", points)):
        (model / f"{kind}.bin").write_bytes(content)
    write_images(folder / "images", scene)


# LLFF, and phones.


def _llff(folder: Path, scene: Scene) -> None:
    rows = []
    for c2w, (width, height), (focal, _) in zip(scene.c2w, scene.sizes, scene.focal, strict=True):
        right, up, backward, position = c2w.T
        matrix = np.stack([-up, right, backward, position, [height, width, focal]], axis=1)
        rows.append(np.concatenate([matrix.ravel(), [0.1, 100.0]]))
    np.save(folder / "poses_bounds.npy", np.array(rows))
    write_images(folder / "images", scene)


def _polycam(folder: Path, scene: Scene) -> None:
    cameras = folder / "keyframes" / "corrected_cameras"
    cameras.mkdir(parents=True)
    for view, name in enumerate(scene.names):
        plain = {f"t_{row}{column}": float(scene.c2w[view, row, column]) for row in range(3) for column in range(4)}
        numbers = np.concatenate([scene.focal[view], scene.centre[view], scene.sizes[view]]).tolist()
        plain |= dict(zip(("fx", "fy", "cx", "cy", "width", "height"), numbers, strict=True))
        write_json(cameras / f"{name}.json", plain | {"blur_score": 80.0})
    write_images(folder / "keyframes" / "corrected_images", scene, ".jpg")


def _record3d(folder: Path, scene: Scene) -> None:
    """An archive, capture.r3d."""
    poses = []
    for c2w in scene.c2w:
        # COLMAP's quaternion is of the inverse of a rotation whose axes 1 and 2 are negated.
        (w, x, y, z), _ = _world_to_camera(c2w * (1, -1, -1, 1))
        poses.append([float(value) for value in (-x, -y, -z, w, *c2w[:, 3])])
    width, height = scene.sizes[0].tolist()
    own = np.concatenate([scene.focal, scene.centre], axis=1).tolist()
    plain = {"w": width, "h": height, "K": [1.0] * 9, "perFrameIntrinsicCoeffs": own, "poses": poses}
    with zipfile.ZipFile(folder / "capture.r3d", "w") as archive:
        archive.writestr("metadata", json.dumps(plain))
        for i, image in enumerate(scene.images):
            content = BytesIO()
            Image.fromarray(image).save(content, "JPEG")
            archive.writestr(f"rgbd/{i}.jpg", content.getvalue())
            archive.writestr(f"rgbd/{i}.depth", b"bvx-")


DIALECTS: dict[str, Callable[[Path, Scene], None]] = {
    "blender": _blender,
    "instant-ngp": _instant_ngp,
    "nerfstudio": _nerfstudio,
    "colmap-text": _colmap_text,
    "colmap-binary": _colmap_binary,
    "llff": _llff,
    "polycam": _polycam,
    "record3d": _record3d,
}


def scene_path(dialect: str, folder: Path) -> Path:
    """What to give as the scene, where `write` wrote it into a folder."""
    return folder / "capture.r3d" if dialect == "record3d" else folder
