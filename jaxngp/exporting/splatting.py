"""A differentiable rasteriser of Gaussian splats, and their refinement against the pictures a field renders.

Zwicker et al. (2001) project a Gaussian to an ellipse of an image; Kerbl et al. (2023, 3DGS) composite these in tiles,
in order of depth. The constants are those of 3DGS's viewers, so that splats are refined for how they will be drawn.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Cameras
from jaxngp.encodings import sh_encode

SMOOTHING = 0.3  # px^2, added to the variances of an ellipse
FAINTEST, DENSEST = 1 / 255, 0.99  # opacity of a splat at a pixel: below it is skipped, above it is cut
REACH = 3.0  # standard deviations up to which a splat is drawn
ASIDE = 1.3  # of the picture's half width: farther aside an ellipse grows no longer
NEAR = 0.05  # scene units; what is nearer is not drawn
DARK = 1e-4  # transmittance below which a pixel is finished
TILE = 8  # px, the side of a tile
GROUP = 32  # tiles that are composited together

_PIXEL = np.stack(np.meshgrid(*[np.arange(TILE, dtype=np.float32) - (TILE - 1) / 2] * 2), axis=-1).reshape(-1, 2)
_X, _Y = _PIXEL.T
QUADRATIC = np.stack([np.ones_like(_X), _X, _Y, _X * _X, _X * _Y, _Y * _Y], axis=1)  # (64, 6), from a tile's middle


@struct.dataclass
class Gaussians:
    """N Gaussians in scene units, in terms that may take any value; N is the last axis, which is fast on a CPU."""

    position: jax.Array  # (3, N)
    log_scale: jax.Array  # (3, N), logarithms of standard deviations
    rotation: jax.Array  # (4, N), quaternions xyzw of any length
    logit: jax.Array  # (N,), log odds of the opacity
    harmonics: jax.Array  # ((degree + 1)^2, 3, N), of sRGB - 1/2 towards directions from the eye


@struct.dataclass
class Ellipses:
    """What a camera sees of N Gaussians."""

    middle: jax.Array  # (2, N) px
    variance: jax.Array  # (3, N) px^2: xx, xy, yy
    depth: jax.Array  # (N,) scene units
    log_opacity: jax.Array  # (N,)
    rgb: jax.Array  # (3, N)


@struct.dataclass
class Bins:
    """The splats of each tile of a picture, the nearest first.

    Tiles are composited in G groups of T. A group takes rows start[g] to start[g + 1] of the table, and a tile one
    column of these.
    """

    splat: np.ndarray  # (R, T) i32; the number of splats where there is none
    start: np.ndarray  # (G + 1,) i32
    corner: np.ndarray  # (G, 2, T) f32 px, the upper left corner of each tile
    group: np.ndarray  # (R,) i32, the group of each row


def project(gaussians: Gaussians, camera: Cameras) -> Ellipses:
    """The ellipses of Gaussians in a pinhole camera."""
    c2w = jnp.asarray(camera.c2w)
    turn = c2w[:, :3] * np.array([1, -1, -1], np.float32)  # x right, y down, z forwards
    offset = gaussians.position - c2w[:, 3:]
    x, y, depth = (_dot(turn[:, axis], offset) for axis in range(3))
    z = jnp.maximum(depth, NEAR)
    axes, scale = rotation_matrix(gaussians.rotation), jnp.exp(gaussians.log_scale)
    local = [[_dot(turn[:, row], [axes[i][j] for i in range(3)]) * scale[j] for j in range(3)] for row in range(3)]
    fx, fy = camera.focal_xy[0], camera.focal_xy[1]
    slope_x, slope_y = (
        jnp.clip(a / z, -limit, limit)
        for a, limit in zip((x, y), ASIDE * camera.size / (2 * camera.focal_xy), strict=True)
    )
    across = [fx / z * (local[0][j] - slope_x * local[2][j]) for j in range(3)]
    down = [fy / z * (local[1][j] - slope_y * local[2][j]) for j in range(3)]
    direction = offset / jnp.sqrt(_dot(offset, offset))
    basis = sh_encode(jnp.moveaxis(direction, 0, -1), degree=round(len(gaussians.harmonics) ** 0.5))
    # A sum written out, so that slices meet the arrays that were stacked: four times as fast on a CPU.
    shade = sum(basis[:, j] * harmonic for j, harmonic in enumerate(gaussians.harmonics))
    return Ellipses(
        jnp.stack([fx * x / z + camera.centre_xy[0], fy * y / z + camera.centre_xy[1]]),
        jnp.stack([_dot(across, across) + SMOOTHING, _dot(across, down), _dot(down, down) + SMOOTHING]),
        depth,
        jax.nn.log_sigmoid(gaussians.logit),
        jnp.maximum(0.5 + shade, 0),
    )


def _dot(a: Any, b: Any) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rotation_matrix(quaternion: jax.Array) -> list[list[jax.Array]]:
    """The matrices, as rows of entries (N,), of quaternions xyzw (4, N) of any length."""
    x, y, z, w = quaternion / jnp.sqrt(jnp.sum(quaternion**2, axis=0))
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]


def sort_into_tiles(ellipses: Ellipses, width: int, height: int, rows: int = 0) -> Bins:
    """Which splats each tile of a picture composites: all that reach into it. The table gets `rows`, or what it needs.

    In numpy, and not differentiated: the order of splats has no derivative.
    """
    middle, variance, depth, log_opacity = (
        np.asarray(a) for a in (ellipses.middle, ellipses.variance, ellipses.depth, ellipses.log_opacity)
    )
    deviations = np.sqrt(np.clip(2 * (log_opacity - np.log(FAINTEST)), 0, REACH**2))
    reach, size = deviations * np.sqrt(variance[::2]), np.array([[width], [height]])
    shape = -(-size // TILE)
    # Pixel centres lie half a pixel within a tile.
    low, high = (
        np.floor((np.clip(middle + side * reach, -1, size + 1) - 0.5) / TILE).astype(np.int32) for side in (-1, 1)
    )
    low = low.clip(0)
    span = (np.minimum(high, shape - 1) - low + 1).clip(0)
    count = np.where((depth > NEAR) & (deviations > 0), span[0] * span[1], 0)
    near = np.argsort(depth).astype(np.int32)
    near = near[count[near] > 0]
    splat, first = np.repeat(near, count[near]), np.cumsum(count[near]) - count[near]
    within = np.arange(len(splat), dtype=np.int32) - np.repeat(first, count[near]).astype(np.int32)
    down, across = np.divmod(within, span[0][splat])
    tile = low[0][splat] + across + shape[0, 0] * (low[1][splat] + down)
    order = np.argsort(tile.astype(np.int16 if shape.prod() < 2**15 else np.int32), kind="stable")  # sorts by radix
    return _pack(splat[order], tile[order], len(depth), shape[:, 0], rows)


def _pack(splat: np.ndarray, tile: np.ndarray, num_splats: int, shape: np.ndarray, rows: int) -> Bins:
    """Bins from the splats of tiles, in order. Tiles with equally many are grouped together."""
    num_groups = -(-int(shape.prod()) // GROUP)
    count = np.bincount(tile, minlength=num_groups * GROUP)
    place = np.arange(len(tile)) - (np.cumsum(count) - count)[tile]
    order = np.argsort(-count, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    length = count[order].reshape(num_groups, GROUP)[:, 0]
    start = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    table = np.full((max(rows, start[-1], 1), GROUP), num_splats, np.int32)
    table[start[rank[tile] // GROUP] + place, rank[tile] % GROUP] = splat
    corner = np.stack([order % shape[0], order // shape[0]]).astype(np.float32) * TILE
    group = np.minimum(np.searchsorted(start, np.arange(len(table)), side="right") - 1, num_groups - 1)
    return Bins(table, start, np.moveaxis(corner.reshape(2, num_groups, GROUP), 0, 1), group.astype(np.int32))


def draw(gaussians: Gaussians, camera: Cameras, bins: Bins) -> jax.Array:
    """Colours on black and transmittances (G, 4, 64, T) of the pixels of the tiles; differentiable in the Gaussians."""
    seen = project(gaussians, camera)
    xx, xy, yy = seen.variance
    inverse = 1 / (xx * yy - xy * xy)
    table = jnp.stack([*seen.middle, yy * inverse, -xy * inverse, xx * inverse, seen.log_opacity, *seen.rgb], axis=1)
    # What is in no tile: of no opacity.
    nothing = np.array([[0, 0, 0, 0, 0, -100, 0, 0, 0]], np.float32)
    x, y, a, b, c, log_opacity, *rgb = jnp.moveaxis(jnp.concatenate([table, nothing])[bins.splat], -1, 0)
    x = bins.corner[bins.group, 0] + TILE / 2 - x  # from the splat to the tile's middle
    y = bins.corner[bins.group, 1] + TILE / 2 - y
    along, across = a * x + b * y, b * x + c * y
    peak = log_opacity - 0.5 * (along * x + across * y)
    terms = [peak, -along, -across, -0.5 * a, -b, -0.5 * c, *rgb]
    return composite(jnp.stack(terms, axis=1), log_opacity, bins.start)


@jax.custom_vjp
def composite(terms: jax.Array, log_opacity: jax.Array, start: jax.Array) -> jax.Array:
    """Splats over one another: terms (R, 9, T), log_opacity (R, T), start (G + 1,) -> (G, 4, 64, T).

    terms: of the logarithm of a splat's opacity, as a polynomial over the tile (`QUADRATIC`), then its colour. Of the
    result: colour on black, and transmittance. log_opacity says where a splat ends, and has no derivative.
    """
    return _composite(terms, log_opacity, start)[0]


def _opacity(term: jax.Array, log_opacity: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The opacity (64, T) of one splat a tile, and where it has a derivative."""
    log = jnp.dot(QUADRATIC, term[:6], precision=lax.Precision.HIGHEST)
    opacity = jnp.exp(log)
    drawn = (opacity >= FAINTEST) & (log >= log_opacity - 0.5 * REACH**2)
    return jnp.where(drawn, jnp.minimum(opacity, DENSEST), 0), drawn & (opacity < DENSEST)


def _composite(terms: jax.Array, log_opacity: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
    def step(row: jax.Array, carry: tuple) -> tuple:
        light, red, green, blue = carry
        term = terms[row]
        weight = light * _opacity(term, log_opacity[row])[0]
        return light - weight, red + weight * term[6], green + weight * term[7], blue + weight * term[8]

    def one_group(ends: tuple) -> tuple[jax.Array, jax.Array]:
        none = jnp.zeros((TILE * TILE, terms.shape[-1]), terms.dtype)
        carry = (ends[0], (none + 1, none, none, none))
        row, (light, *rgb) = lax.while_loop(
            lambda carry: (carry[0] < ends[1]) & (jnp.max(carry[1][0]) > DARK),
            lambda carry: (carry[0] + 1, step(*carry)),
            carry,
        )
        return jnp.stack([*rgb, light]), row

    pixels, end = lax.map(one_group, (start[:-1], start[1:]))
    return pixels, (terms, log_opacity, start[:-1], end, pixels)


def _composite_backwards(saved: Any, slope: jax.Array) -> tuple[jax.Array, None, None]:
    """The derivative, from the nearest splat on: what lies behind one is the sum of all less what was passed."""
    terms, log_opacity, start, end, pixels = saved

    def one_group(slopes: jax.Array, group: tuple) -> tuple[jax.Array, None]:
        first, end, pixels, slope = group

        def step(row: jax.Array, carry: tuple) -> tuple:
            light, behind, slopes = carry
            term = terms[row]
            opacity, smooth = _opacity(term, log_opacity[row])
            weight = light * opacity
            value = slope[0] * term[6] + slope[1] * term[7] + slope[2] * term[8]
            behind = behind - weight * value
            by_log = jnp.where(smooth, weight * value - opacity / (1 - opacity) * behind, 0)
            polynomial = jnp.dot(QUADRATIC.T, by_log, precision=lax.Precision.HIGHEST)
            colour = jnp.stack([jnp.sum(weight * slope[channel], axis=0) for channel in range(3)])
            return light - weight, behind, slopes.at[row].set(jnp.concatenate([polynomial, colour]))

        carry = (jnp.ones_like(pixels[3]), jnp.sum(slope * pixels, axis=0), slopes)
        return lax.fori_loop(first, end, step, carry)[2], None

    return lax.scan(one_group, jnp.zeros_like(terms), (start, end, pixels, slope))[0], None, None


composite.defvjp(_composite, _composite_backwards)


def pixel_places(bins: Bins) -> tuple[np.ndarray, np.ndarray]:
    """x and y (G, 64, T) i32 of the pixels of the tiles; those of tiles that fill up the last group lie outside."""
    within = np.arange(TILE * TILE, dtype=np.int32)[:, None]
    corner = bins.corner.astype(np.int32)
    return corner[:, :1] + within % TILE, corner[:, 1:] + within // TILE


def as_picture(pixels: np.ndarray, bins: Bins, width: int, height: int) -> np.ndarray:
    """The tiles (G, 4, 64, T) of `draw` as a picture (H, W, 4)."""
    picture = np.zeros((height, width, 4), pixels.dtype)
    x, y = pixel_places(bins)
    inside = (x < width) & (y < height)
    picture[y[inside], x[inside]] = np.moveaxis(pixels, 1, -1)[inside]
    return picture
