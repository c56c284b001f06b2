"""NeRF-synthetic scenes: a `transforms_<split>.json` and the images that it names.

The json gives the horizontal field of view (`camera_angle_x`, radians) or the focal length in pixels (`fl_x`), and
for every frame a `file_path` (relative to the json, with or without the extension) and a camera-to-world matrix
with OpenGL axes. The pixels are sRGB with straight alpha. Images lie in the folder of the json: no name and no link
leads out of it.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxngp.cameras import PosedImages, make_cameras, pose_images
from jaxngp.config import MAX_LENGTH, InputError, shown

# Told by the first bytes, whatever a file is called. PIL knows many more; for one of them it runs Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
POSE_TOLERANCE = 1e-3  # of the entries of R^T R - I, of det R - 1 and of the matrix's last row
FOCAL_RANGE = (1e-2, 1e7)  # px; beyond it float32 has no digits left for where pixels look
PIXELS_AT_ONCE = 2**27  # that threads decode side by side; a pixel takes up to 16 bytes meanwhile
PLAIN_PIXELS = 2**24  # with more, an image needs a byte for ...
PIXELS_PER_BYTE = 1000  # ... so many; a header of a few bytes may promise any number, and a decoder make them up
MAX_DISTORTION = 1e-9  # a coefficient below it moves no pixel
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")
ALPHA_MODES = ("RGBA", "LA", "PA")


@dataclass(frozen=True)
class Frame:
    """One view: its name, its image file, and c2w (3, 4) f64, camera to world units as it is read."""

    name: str
    image: Path
    c2w: np.ndarray


@dataclass(frozen=True)
class Transforms:
    """What one transforms file says. Focal length and principal point are in pixels of an image of `width`."""

    path: Path
    angle_xy: tuple[float | None, float | None]  # field of view, radians
    focal_xy: tuple[float | None, float | None]
    centre_xy: tuple[float | None, float | None]
    size: tuple[float | None, float | None]  # (width, height), px
    frames: tuple[Frame, ...]


CAMERA_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")

# The transforms file.


def read_transforms(path: Path) -> Transforms:
    """Reads and checks a transforms file; opens no image. Raises InputError where it is not as described above."""
    plain = _read_json(path)
    transforms = Transforms(
        path=path,
        angle_xy=(_number(plain, "camera_angle_x", path), _number(plain, "camera_angle_y", path)),
        focal_xy=(_number(plain, "fl_x", path), _number(plain, "fl_y", path)),
        centre_xy=(_number(plain, "cx", path), _number(plain, "cy", path)),
        size=(_number(plain, "w", path), _number(plain, "h", path)),
        frames=_read_frames(plain, path),
    )
    _check_intrinsics(plain, transforms)
    return transforms


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a transforms file of a scene") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number too long to convert
        raise InputError(f"{path}: is not JSON ({error}); export or download the file again") from None
    if not isinstance(plain, dict):
        raise InputError(f"{path}: expected a JSON object with 'camera_angle_x' and 'frames'; export the file again")
    return plain


def _number(plain: dict[str, Any], key: str, path: Path) -> float | None:
    """The finite number at `key`, or None where there is none."""
    if key not in plain:
        return None
    if (value := _finite(plain[key])) is None:
        raise InputError(f"{path}: {key!r} is no finite number; correct it")
    return value


def _finite(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def _check_intrinsics(plain: dict[str, Any], transforms: Transforms) -> None:
    path, angle = transforms.path, transforms.angle_xy[0]
    if angle is None and transforms.focal_xy[0] is None:
        raise InputError(f"{path}: the key 'camera_angle_x' is missing; add the horizontal field of view in radians")
    for key, value in zip(("camera_angle_x", "camera_angle_y"), transforms.angle_xy, strict=True):
        if value is not None and not 0 < value < math.pi:
            raise InputError(f"{path}: {key} = {value}: expected radians between 0 and pi")
    positive = zip(("fl_x", "fl_y", "w", "h"), transforms.focal_xy + transforms.size, strict=True)
    for key, value in positive:
        if value is not None and value <= 0:
            raise InputError(f"{path}: {key} = {value}: expected a positive number of pixels")
    if (model := plain.get("camera_model", "PINHOLE")) not in CAMERA_MODELS:
        raise InputError(f"{path}: camera_model = {shown(model)}: expected one of {', '.join(CAMERA_MODELS)}")
    for key in (*DISTORTION_KEYS, "fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y"):
        for index, frame in enumerate(plain["frames"]):
            if key in frame and frame[key] != plain.get(key):
                raise InputError(f"{path}: frame {index} has a {key} of its own: only one camera for all is supported")
    for key in DISTORTION_KEYS:
        if abs(_number(plain, key, path) or 0) > MAX_DISTORTION:
            said = shown(plain[key])
            raise InputError(f"{path}: {key} = {said}: lens distortion is not supported; undistort the images")


def _read_frames(plain: dict[str, Any], path: Path) -> tuple[Frame, ...]:
    frames = plain.get("frames")
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path}: expected 'frames' to be a list of at least one view; export the file again")
    files = [_image_path(frame, path, index) for index, frame in enumerate(frames)]
    stems = Counter(file.stem for file in files)
    return tuple(
        # Two folders may hold a file of one name: then a view is known by its whole path.
        Frame(file.stem if stems[file.stem] == 1 else f"{file.relative_to(path.parent)}", file, _pose(frame, path, i))
        for i, (frame, file) in enumerate(zip(frames, files, strict=True))
    )


def _image_path(frame: object, path: Path, index: int) -> Path:
    """The image of a frame; it need not exist, but lies in the folder of the transforms file."""
    name = frame.get("file_path") if isinstance(frame, dict) else None
    inside = Path(os.path.normpath(name)) if isinstance(name, str) and name.isprintable() else Path()
    if not inside.name:  # as that of "a/.." too
        raise InputError(f"{path}: frame {index} has no 'file_path' that is the name of a file; export the file again")
    if inside.is_absolute() or inside.parts[0] == os.pardir:
        raise InputError(f"{path}: frame {index}: {shown(name)} leaves the scene's folder; move the image into it")
    return path.parent / (inside if inside.suffix.lower() in IMAGE_SUFFIXES else f"{inside}.png")


def _pose(frame: dict[str, Any], path: Path, index: int) -> np.ndarray:
    """c2w (3, 4) f64 of a frame whose transform_matrix is a rotation and a position."""
    rows = frame.get("transform_matrix")
    where = f"{path}: frame {index} ({shown(frame['file_path'])})"
    lists = isinstance(rows, list) and len(rows) in (3, 4) and all(isinstance(r, list) and len(r) == 4 for r in rows)
    numbers = [[_finite(value) for value in row] for row in rows] if lists and rows else []
    if not numbers or any(value is None for row in numbers for value in row):
        raise InputError(f"{where}: expected 'transform_matrix' to be 4 rows of 4 finite numbers; export it again")
    matrix = np.asarray(numbers, np.float64)
    rotation, far = matrix[:3, :3], np.abs(matrix).max() > MAX_LENGTH
    error = math.inf if far else np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > POSE_TOLERANCE or abs(np.linalg.det(rotation) - 1) > POSE_TOLERANCE:
        raise InputError(f"{where}: 'transform_matrix' is no pose: expected a rotation without scale or mirror in it")
    if len(matrix) == 4 and np.abs(matrix[3] - (0, 0, 0, 1)).max() > POSE_TOLERANCE:
        raise InputError(f"{where}: 'transform_matrix' is no pose: expected 0 0 0 1 as its last row")
    return matrix[:3]


# The images.


def load_views(transforms: Transforms, frames: Sequence[Frame], downscale: int) -> tuple[PosedImages, bool]:
    """The images of `frames` as numpy arrays, and whether any has an alpha channel.

    c2w stays in the units that the frames have. All images must be of one size, which `downscale` divides. An image
    without alpha gets alpha 255.
    """
    for frame in frames:
        _check_file(frame.image, transforms.path.parent)
    width, height = _probe(frames[0].image)
    size = _reduced_size(width, height, downscale, transforms.path)
    camera = _camera(transforms, (width, height), downscale)
    rgba = np.empty((len(frames), size[1], size[0], 4), np.uint8)

    def load(view: int) -> bool:
        pixels, has_alpha = _read_image(frames[view].image, (width, height), frames[0].image)
        rgba[view] = box_downscale(pixels, downscale)
        return has_alpha

    # PIL and zlib release the GIL. An image is reduced as soon as it is read, so few are held at full size.
    workers = min(8, os.cpu_count() or 1, max(1, PIXELS_AT_ONCE // (width * height)))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        loaded = pool.map(load, range(len(frames)))
        bar = tqdm(loaded, transforms.path.name, len(frames), delay=1.0, disable=None, leave=False, unit="image")
        has_alpha = any([*bar])
    c2w = np.stack([frame.c2w for frame in frames]).astype(np.float32)
    return pose_images(make_cameras(c2w, **camera), rgba), has_alpha


def box_downscale(rgba: np.ndarray, downscale: int) -> np.ndarray:
    """Means over downscale x downscale pixels, colours weighted by alpha. rgba (H, W, 4) u8 -> (H/d, W/d, 4) u8.

    This is the box filter on colours that are multiplied by alpha, divided by the mean alpha; where all of a block
    is transparent its colour is 0.
    """
    if downscale == 1:
        return rgba
    blocks = [rgba[y::downscale, x::downscale] for y in range(downscale) for x in range(downscale)]
    # Integers: the sums are exact, whatever the factor.
    alpha = np.zeros(blocks[0].shape[:2], np.int64)
    colour = np.zeros((*alpha.shape, 3), np.int64)
    for block in blocks:
        alpha += block[..., 3]
        colour += block[..., :3] * block[..., 3:].astype(np.int32)
    rgb = np.rint(colour / np.maximum(alpha, 1)[..., None])
    return np.concatenate([rgb, np.rint(alpha / downscale**2)[..., None]], axis=-1).astype(np.uint8)


def _camera(transforms: Transforms, size: tuple[int, int], downscale: int) -> dict:
    """The camera of the reduced images, whose full size is `size` = (width, height)."""
    said = [s or float(pixels) for s, pixels in zip(transforms.size, size, strict=True)]
    if abs(said[0] * size[1] - said[1] * size[0]) > max(said):
        raise InputError(
            f"{transforms.path}: w, h = {said[0]:g}, {said[1]:g} but the images are {size[0]}x{size[1]}: "
            "expected one aspect ratio; correct w and h, or use the images that belong to them"
        )
    focal_x, focal_y = (
        focal / said[i] * size[i] if focal else angle and 0.5 * size[i] / max(math.tan(0.5 * angle), 1e-99)
        for i, (focal, angle) in enumerate(zip(transforms.focal_xy, transforms.angle_xy, strict=True))
    )
    focal: tuple[float, float] = focal_x, focal_y or focal_x  # type: ignore[assignment]
    centre = [0.5 * n if c is None else c / s * n for c, s, n in zip(transforms.centre_xy, said, size, strict=True)]
    low, high = FOCAL_RANGE
    if not (all(low <= f <= high for f in focal) and all(abs(c) <= high for c in centre)):
        raise InputError(
            f"{transforms.path}: focal length {focal[0]:g}, {focal[1]:g} and centre {centre[0]:g}, {centre[1]:g} "
            f"in pixels: expected {low:g} to {high:g}; correct camera_angle_x, fl_x, cx or w"
        )
    return dict(
        focal_xy=np.asarray(focal, np.float32) / downscale,  # type: ignore[arg-type]
        centre_xy=np.asarray(centre, np.float32) / downscale,  # type: ignore[arg-type]
        width=size[0] // downscale,
        height=size[1] // downscale,
    )


def _reduced_size(width: int, height: int, downscale: int, path: Path) -> tuple[int, int]:
    if width % downscale or height % downscale:
        common = math.gcd(width, height)
        divisors = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise InputError(
            f"scene.downscale = {downscale}: does not divide the {width}x{height} images of {path}; "
            f"use one of {divisors}"
        )
    return width // downscale, height // downscale


def _check_file(path: Path, folder: Path) -> None:
    """Raises InputError where a link leads out of the scene's folder, or to what is no file and may never end."""
    found = Path(os.path.realpath(path))
    if not found.is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{path}: links to {found}, which leaves the scene's folder; put the image itself there")
    try:
        regular = stat.S_ISREG(found.stat().st_mode)
    except OSError:  # opening it will say what is wrong
        return
    if not regular:
        raise InputError(f"{path}: is no file; put the image there, or take its frame out of the json")


def _probe(path: Path) -> tuple[int, int]:
    """(width, height) of an image, from its header."""
    with _open(path) as image:
        return image.size


def _read_image(path: Path, size: tuple[int, int], first: Path) -> tuple[np.ndarray, bool]:
    """The pixels (H, W, 4) u8 of an image of the given (width, height), and whether it has an alpha channel."""
    with _open(path) as image:
        if image.size != size:
            raise InputError(
                f"{path}: is {image.width}x{image.height} but {first.name} is {size[0]}x{size[1]}; "
                "all images of a split must have one size"
            )
        if image.mode not in (*ALPHA_MODES, "RGB", "L", "P"):
            raise InputError(f"{path}: pixel format {image.mode!r} is not supported; convert it to 8-bit RGBA")
        has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
        try:
            return np.asarray(image.convert("RGBA")), has_alpha
        except Exception as error:  # a decoder met with a broken file raises whatever it likes
            raise InputError(f"{path}: broken or truncated ({error}); render or download it again") from None


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except FileNotFoundError:
        raise InputError(f"{path}: the image is missing; put it there, or take its frame out of the json") from None
    except Exception as error:  # as above; a decompression bomb is found here too
        raise InputError(f"{path}: is no readable image ({error}); render or download it again") from None
    num_bytes, num_pixels = path.stat().st_size, image.width * image.height
    if num_pixels > min(max(PLAIN_PIXELS, PIXELS_PER_BYTE * num_bytes), Image.MAX_IMAGE_PIXELS or math.inf):
        image.close()
        raise InputError(
            f"{path}: {image.width}x{image.height} pixels are too many, at all or for {num_bytes} bytes; "
            "scale the images down"
        )
    return image
