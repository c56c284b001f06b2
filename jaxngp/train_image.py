"""Learn an image, up to gigapixels, as a function of position: (x, y) -> RGB (paper section 5.1).

    python -m jaxngp.train_image                                   # the built-in image, 2048 x 2048
    python -m jaxngp.train_image --image=photo.jpg --max_seconds=60
    python -m jaxngp.train_image --size=32768x32768 --log2_table_size=20

Reports the PSNR over all pixels, the bits per pixel of the parameters and of the file, and how the PSNR grew over the
seconds of training; writes the reconstruction and the error beside the truth, with a part of them enlarged. The same
command goes on where an interrupted run stopped; a finished run is only evaluated again.

PNG, JPEG, TIFF, WebP, BMP and .npy are read as they are, .exr with `pip install .[image]`. An image that is larger than
--hold allows stays on disk, and only the pixels that are drawn are read.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from jaxngp import flags, runs
from jaxngp.config import (
    CosineDecay,
    HashGridConfig,
    ImageConfig,
    ImageSourceConfig,
    ImageTrainConfig,
    InputError,
    OptimizerConfig,
    PointFieldConfig,
    apply_overrides,
    to_json,
)
from jaxngp.console import bar_interval
from jaxngp.data import content_fingerprint
from jaxngp.data.atlas import builtin_image
from jaxngp.data.image import StoredImage, read_image, tiles
from jaxngp.device import compiler_options, default_placement, device_memory, on_cpu
from jaxngp.fields import ImageField
from jaxngp.hashing import level_offsets
from jaxngp.images import blend_taps, pixel_taps, tile_centres
from jaxngp.metrics import psnr
from jaxngp.pictures import contact_sheet, error_image, to_uint8, write_png
from jaxngp.records import append_jsonl, environment, keep_lines, table, write_json
from jaxngp.training.image import ImagePixels
from jaxngp.training.loop import Progress, train

TABLE_SIZES = range(14, 25)  # log2 T
LARGEST_ON_CPU = 19  # log2 T, by default: Adam would take most of a step's time for a larger table, and 2 GB
TILE = 512  # px per side of what is evaluated at once
PANEL = 512  # px per side, at most, of a picture on the sheet
CROP = 128  # px per side of what the sheet shows enlarged
PART = 2**14  # points that are evaluated at once for the curve
CURVE_PIXELS = 2**20  # on which the curve is measured, of a larger image: a rectangle's middle each
MARKS = tuple(m * s for s in (1, 10, 100, 1000, 10_000) for m in (1, 2, 3, 5, 7))  # seconds
MAX_PNG_PIXELS = 2**26  # of a reconstruction that is written in full
HELD_BYTES = 2**28  # of an image that --hold=auto gives to a CPU


# What is learned.


def image_config(values: flags.Flags, picture: ImageSourceConfig, image: StoredImage, on_cpu: bool) -> ImageConfig:
    """The config for an image: N_max is half its longer side, as instant-ngp has it."""
    longer = max(image.width, image.height)
    encoding = HashGridConfig(num_dims=2, max_resolution=max(16, longer // 2))
    if values.log2_table_size:
        encoding = replace(encoding, table_size=2**values.log2_table_size)
    else:
        encoding = fitting_grid(encoding, image.width * image.height * 3 // 4, LARGEST_ON_CPU if on_cpu else 24)
    config = default_config(encoding, on_cpu)
    config = replace(config, image=picture, train=flags.loop_config(config.train, values))
    return apply_overrides(config, values.override)


def default_config(encoding: HashGridConfig, on_cpu: bool) -> ImageConfig:
    """What suits the device: a minute of training either way.

    On a CPU a step of a large table is mostly Adam's, and so is taken with more points.
    """
    num_points = min(max(encoding.table_size // 4, 2**14), 2**16) if on_cpu else 2**18
    return ImageConfig(
        field=PointFieldConfig(encoding=encoding, num_outputs=3),
        optimizer=OptimizerConfig(decay=CosineDecay(), ema_decay=0.0),
        train=ImageTrainConfig(max_steps=10**7, max_seconds=60.0, num_points=num_points),
    )


def fitting_grid(grid: HashGridConfig, budget: int, largest: int) -> HashGridConfig:
    """The grid with the largest table, up to 2^largest entries a level, that holds at most `budget` numbers."""
    sizes = [size for size in TABLE_SIZES if size <= largest]
    grids = [replace(grid, table_size=2**size) for size in sizes]
    fitting = [g for g in grids if level_offsets(g)[-1] * g.num_features <= budget]
    return fitting[-1] if fitting else grids[0]


def picture_config(values: flags.Flags) -> ImageSourceConfig:
    """Which image the flags and overrides name. Raises InputError."""
    if values.image:
        picture = ImageSourceConfig(path=os.path.realpath(values.image), background=values.background)
    else:
        width, x, height = values.size.lower().partition("x")
        if not (width.isdecimal() and (height if x else width).isdecimal()):
            raise InputError(f"--size={values.size}: expected width x height in pixels, as in 2048x1024, or one number")
        picture = ImageSourceConfig(width=int(width), height=int(height or width), background=values.background)
    own = [override for override in values.override if override.strip().startswith("image.")]
    return apply_overrides(ImageConfig(image=picture), own).image


def load(picture: ImageSourceConfig) -> StoredImage:
    """The image a config names: a file, or the built-in one."""
    if picture.path:
        return read_image(Path(picture.path), background=picture.background)
    return builtin_image(picture.width, picture.height)


def hold(image: StoredImage, where: str) -> ImagePixels | StoredImage:
    """The image on the device, or as it is where it stays on the host: --hold."""
    limit = {"device": math.inf, "host": 0}.get(where, HELD_BYTES)
    if where == "auto" and not on_cpu():
        limit = (device_memory() or 2**32) / 4
    return image if image.pixels.nbytes > limit else ImagePixels(default_placement().put(jnp.asarray(image.pixels)))


# How good it is. Values are sRGB, clipped to [0, 1] as on a screen, also for HDR images.


@functools.partial(jax.jit, static_argnames=("width", "height"))
def predict_tile(field: ImageField, left: jax.Array, top: jax.Array, *, width: int, height: int) -> jax.Array:
    """The square of TILE pixels whose first is at (left, top): (TILE, TILE, 3) in [0, 1]."""
    position = tile_centres(left, top, size=TILE, width=width, height=height)
    return jnp.clip(field(position), 0, 1).reshape(TILE, TILE, 3)


@jax.jit
def mean_error(field: ImageField, position: jax.Array, truth: jax.Array) -> jax.Array:
    """The mean squared error at positions (N, 2) of colours (N, 3), in parts that fit a cache."""
    size = min(PART, len(position))
    missing = -len(position) % size

    def parts(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, missing), (0, 0)), mode="edge").reshape(-1, size, array.shape[1])

    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean((jnp.clip(field(part[0]), 0, 1) - jnp.clip(part[1], 0, 1)) ** 2, axis=1)

    return jnp.mean(jax.lax.map(one, (parts(position), parts(truth))).reshape(-1)[: len(position)])


class Curve:
    """The PSNR as training goes on, on all pixels of a small image and on a fixed lattice of those of a large one."""

    def __init__(self, image: StoredImage, path: Path) -> None:
        self._path, self._last = path, 0.0
        count = min(CURVE_PIXELS, image.width * image.height)
        columns = max(1, min(image.width, round(math.sqrt(count * image.width / image.height))))
        rows = max(1, count // columns)
        x, y = ((np.arange(n) + 0.5) / n for n in (columns, rows))
        position = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
        taps = pixel_taps(jnp.asarray(position), width=image.width, height=image.height, snap=True)
        values = image.gather(np.asarray(taps.row[:, 0]), np.asarray(taps.column[:, 0]))
        self.num_pixels = len(values)
        self._data = taps.position, blend_taps(jnp.asarray(values)[:, None], taps.weight)

    def add(self, progress: Progress) -> None:
        """Measure where a mark of seconds has been passed, and at the end."""
        if progress.metrics is None:
            keep_lines(self._path, lambda entry: entry["step"] <= progress.step)
            self._last = progress.seconds
            return
        if progress.finished or any(self._last < mark <= progress.seconds for mark in MARKS):
            error = mean_error(progress.field, *self._data)
            entry = {"step": progress.step, "seconds": progress.seconds, "psnr": psnr(error)}
            append_jsonl(self._path, entry)
            self._last = progress.seconds

    def entries(self) -> list[dict[str, float]]:
        """What was measured, interrupted runs of the same workdir included."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


@dataclass
class Comparison:
    """All pixels of an image beside their reconstruction: the error, and pictures of both that fit a sheet."""

    squared_error: float  # mean over all pixels and channels
    truth: np.ndarray  # (h, w, 3) in [0, 1], means over squares of pixels
    prediction: np.ndarray  # the same
    error: np.ndarray  # the same of the absolute difference
    full: np.ndarray | None  # (H, W, 3) u8, the whole reconstruction where it is not too large
    crop: tuple[np.ndarray, np.ndarray]  # (h, w, 3) of truth and prediction: a part of the tile of strongest contrast


def compare(field: ImageField, image: StoredImage) -> Comparison:
    """Walk over all pixels, tile by tile."""
    reduction = -(-max(image.width, image.height) // PANEL)
    side = TILE // reduction * reduction
    reduced = (-(-image.height // reduction), -(-image.width // reduction), 3)
    truth, prediction, error = (np.zeros(reduced, np.float32) for _ in range(3))
    small_enough = image.width * image.height <= MAX_PNG_PIXELS
    full = np.zeros((image.height, image.width, 3), np.uint8) if small_enough else None
    total, best, crop = 0.0, -1.0, (truth, truth)
    predict = jax.jit(
        functools.partial(predict_tile, width=image.width, height=image.height),
        compiler_options=compiler_options(),
    )
    every = [*tiles(image.height, image.width, side)]
    for rows, columns in tqdm(every, desc="evaluating", unit="tile", mininterval=bar_interval()):
        true = image.read(rows, columns).clip(0, 1)
        found = np.asarray(predict(field, np.int32(columns.start), np.int32(rows.start)))
        found = found[: true.shape[0], : true.shape[1]]
        total += float(np.sum(np.square(found - true), dtype=np.float64))
        if full is not None:
            full[rows, columns] = to_uint8(found)
        place = tuple(slice(part.start // reduction, -(-part.stop // reduction)) for part in (rows, columns))
        for picture, part in ((truth, true), (prediction, found), (error, np.abs(found - true))):
            picture[place] = block_means(part, reduction)
        if true.std() > best:
            best, crop = float(true.std()), (middle(true), middle(found))
    mean = total / (image.width * image.height * 3)
    return Comparison(mean, truth, prediction, error, full, crop)


def block_means(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means over factor x factor pixels; blocks at the far edges may be smaller. (H, W, 3) f32."""
    starts = [np.arange(0, n, factor) for n in pixels.shape[:2]]
    sums = np.add.reduceat(np.add.reduceat(pixels, starts[0], axis=0), starts[1], axis=1)
    counts = [np.diff(np.append(start, n)) for start, n in zip(starts, pixels.shape[:2], strict=True)]
    return (sums / (counts[0][:, None] * counts[1])[..., None]).astype(np.float32)


def middle(tile: np.ndarray) -> np.ndarray:
    """CROP pixels in the middle of a tile, or all of a smaller one."""
    top, left = (max(0, side - CROP) // 2 for side in tile.shape[:2])
    return tile[top : top + CROP, left : left + CROP].copy()


def write_pictures(folder: Path, found: Comparison) -> None:
    """The sheet: truth, reconstruction and error, whole and a part enlarged; and the reconstruction by itself."""
    true, part = found.crop
    times = max(1, min(PANEL, max(found.truth.shape)) // max(true.shape))

    def enlarged(pixels: np.ndarray) -> np.ndarray:
        return pixels.repeat(times, axis=0).repeat(times, axis=1)

    sheet = contact_sheet(
        [
            [to_uint8(found.truth), to_uint8(found.prediction), error_image(found.error, np.zeros_like(found.error))],
            [enlarged(a) for a in (to_uint8(true), to_uint8(part), error_image(part, true))],
        ],
        ["image", "reconstruction", "error x 4"],
    )
    write_png(folder / "comparison.png", sheet)
    if found.full is not None:
        write_png(folder / "reconstruction.png", found.full)


# The command.


def define_flags(values: flags.Flags) -> None:
    flags.define_path(values, "image", None, "Path of an image; the built-in one if not given.")
    absl_flags.DEFINE_string(
        "size", "2048", "Width x height of the built-in image, or one number for both.", flag_values=values
    )
    absl_flags.DEFINE_integer(
        "log2_table_size",
        0,
        "Log of the entries per level: 14 to 24; 0 is the largest with a quarter as many parameters as the image has "
        f"numbers, up to {LARGEST_ON_CPU} on a CPU.",
        lower_bound=0,
        upper_bound=TABLE_SIZES[-1],
        flag_values=values,
    )
    absl_flags.DEFINE_enum("background", "white", ["white", "black"], "Behind transparent pixels.", flag_values=values)
    absl_flags.DEFINE_enum(
        "hold",
        "auto",
        ["auto", "device", "host"],
        "Keep the image on the device, or on the host and fetch the pixels of each step; auto keeps up to 256 MB on a "
        "CPU's and a quarter of a GPU's memory. The result is the same.",
        flag_values=values,
    )
    flags.define_loop_flags(
        values,
        workdir="runs/<image>",
        config=lambda _: default_config(HashGridConfig(num_dims=2), on_cpu=True),
    )


def main(values: flags.Flags) -> None:
    if values.log2_table_size and values.log2_table_size not in TABLE_SIZES:
        raise InputError(f"--log2_table_size={values.log2_table_size}: expected 14 to 24, or 0")
    if values.image and values["size"].present:
        raise InputError("--size is that of the built-in image; leave it out with --image")
    picture = picture_config(values)
    image = load(picture)
    for note in image.notes:
        print(note)
    config = image_config(values, picture, image, on_cpu())
    workdir = Path(values.workdir or f"runs/{Path(image.name).stem}")
    seen = content_fingerprint(pixels=image.pixels)
    with runs.training_in(workdir, config, data=seen, restart=values.restart, extend=values.extend) as run:
        print(to_json(config), end="")
        curve, progress = Curve(image, workdir / "curve.jsonl"), run.resume
        if not run.finished:
            for progress in train(config, hold(image, values.hold), resume=run.resume):
                run.record(progress)
                curve.add(progress)
                if run.interrupted:
                    break
        run.exit_if_interrupted()
        assert progress is not None
        report(workdir, image, progress, run.trained_on(), curve)


def report(
    workdir: Path,
    image: StoredImage,
    progress: Progress,
    trained_on: dict[str, Any],
    curve: Curve,
) -> None:
    """Evaluate, write the pictures and summary.json, and print the tables."""
    field = progress.field
    found = compare(field, image)
    runs.remove_pictures(workdir)
    write_pictures(workdir / "pictures", found)
    num_pixels = image.width * image.height
    num_params = sum(leaf.size for leaf in jax.tree.leaves(field.params))
    summary = {
        "image": image.name,
        "width": image.width,
        "height": image.height,
        "psnr": float(psnr(np.asarray(found.squared_error))),
        "colour_space": "sRGB",
        "parameters": num_params,
        "parameters_per_number": num_params / (3 * num_pixels),
        "bits_per_pixel": 32 * num_params / num_pixels,
        "bits_per_pixel_of_file": 8 * image.num_bytes / num_pixels,
        "steps": progress.step,
        "train_seconds": progress.seconds,
        "compile_seconds": progress.compile_seconds,
        "samples_per_second": progress.num_samples / progress.seconds if progress.seconds else 0.0,
        "curve": curve.entries(),
        "curve_pixels": curve.num_pixels,
        **trained_on,
        "evaluated_on": environment(),
    }
    write_json(workdir / "summary.json", summary)
    print(table([{"seconds": round(e["seconds"], 1), "step": e["step"], "PSNR": e["psnr"]} for e in curve.entries()]))
    row = {
        "image": image.name,
        "pixels": f"{image.width}x{image.height}",
        "PSNR": summary["psnr"],
        "parameters": num_params,
        "bit/pixel": summary["bits_per_pixel"],
        "of file": summary["bits_per_pixel_of_file"],
        "steps": progress.step,
        "train s": round(progress.seconds, 1),
        "compile s": round(progress.compile_seconds, 1),
        "Msamples/s": summary["samples_per_second"] / 1e6,
        "peak MB": summary["peak_memory_bytes"] / 1e6,
        "device": summary["device"],
    }
    print(f"\n{table([row])}")
    print(f"PSNR {summary['psnr']:.2f} dB over all {num_pixels} pixels, sRGB; pictures: {workdir / 'pictures'}")


if __name__ == "__main__":
    flags.run("jaxngp.train_image", define_flags, main, __doc__ or "")
