"""Corrections of cameras and exposures that are learned with a scene.

What is learned is a `Refinement`, a part of the training state. `corrected` applies it to the given cameras, and the
rays are cast from those; a gradient in the rays is so one in the corrections.

    Refinement.free --basis--> twists, intrinsics, lenses --corrected--> Cameras --cast--> Rays

Numbers that are learned are preconditioned as in CamP (Park et al. 2023): a basis of each camera, computed once from
the Jacobian of projected points, in which a unit step in any direction moves the image by about one focal length. One
learning rate then serves rotations, translations, focal lengths and lenses. Coarse levels of the hash encoding come
first (BARF, Lin et al. 2021): `level_weights` grows to 1 while cameras move.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from numpy.typing import ArrayLike

from jaxngp.cameras import Cameras, project, unproject
from jaxngp.config import HashGridConfig, InputError, NerfConfig, RefineConfig
from jaxngp.hashing import level_sizes
from jaxngp.lenses import COEFFICIENTS, Lens, make_lens

FREE_COEFFICIENTS = {"perspective": ("k1", "k2"), "fisheye": ("k1", "k2")}
"""The lens coefficients that are refined, the second where the lenses given have any; of other models all."""

DAMPING = 0.1
"""Of the preconditioner, as a share of its diagonal: directions that hardly move the image are not enlarged more."""


@struct.dataclass
class Free:
    """The numbers that are learned, f32; None for what is not. V views, K cameras."""

    pose: jax.Array | None  # (V, 6) preconditioned twist
    camera: jax.Array | None  # (K, Q) preconditioned intrinsics: log focal, centre x y in focal lengths, coefficients
    log_gain: jax.Array | None  # (V, 3), natural logarithm of linear light, before its mean is taken out


@struct.dataclass
class Refinement:
    """Corrections of V views by K cameras, how they are optimised, and the weights of the encoding's levels."""

    free: Free
    opt_state: optax.OptState
    pose_basis: jax.Array | None  # (V, 6, 6)
    camera_basis: jax.Array | None  # (K, Q, Q)
    camera_of_view: jax.Array  # (V,) i32
    level_weights: jax.Array  # (L + 1,) in [0, 1], and last that of the viewing direction


@struct.dataclass
class Rates:
    """Learning rates of K steps, (K,) each, and the weights (L + 1,) of levels and direction in all of them."""

    field: jax.Array
    cameras: jax.Array
    exposure: jax.Array
    level_weights: jax.Array

    def weigh(self, refinement: Refinement | None) -> Refinement:
        """The corrections with the level weights of these steps."""
        assert refinement is not None
        return dataclasses.replace(refinement, level_weights=self.level_weights)


# Rigid motions.


def se3_exp(twist: jax.Array) -> jax.Array:
    """The rigid motion (..., 3, 4) of a twist (..., 6): translation part, then rotation in radians.

    In closed form, with series near zero, so that value and derivative are finite everywhere.
    """
    rho, omega = twist[..., :3], twist[..., 3:]
    square = jnp.sum(omega**2, axis=-1)[..., None, None]
    small = square < 1e-4 if twist.dtype == jnp.float32 else square < 1e-8
    safe = jnp.where(small, 1, square)
    angle = jnp.sqrt(safe)
    a = jnp.where(small, 1 - square / 6 * (1 - square / 20), jnp.sin(angle) / angle)
    b = jnp.where(small, 0.5 - square / 24 * (1 - square / 30), (1 - jnp.cos(angle)) / safe)
    c = jnp.where(small, 1 / 6 - square / 120 * (1 - square / 42), (angle - jnp.sin(angle)) / (safe * angle))
    x, y, z = (omega[..., axis] for axis in range(3))
    zero = jnp.zeros_like(x)
    rows = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
    hat = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    twice = outer_sum(hat, hat)
    eye = jnp.eye(3, dtype=twist.dtype)
    translation = rho + outer_sum(b * hat + c * twice, rho[..., None])[..., 0]
    return jnp.concatenate([eye + a * hat + b * twice, translation[..., None]], axis=-1)


def outer_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """The products of small matrices (..., I, J), (..., J, K), in full precision on every device."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def moved(c2w: jax.Array, twist: jax.Array) -> jax.Array:
    """Poses (..., 3, 4) moved by twists (..., 6) in their own axes; scene units, radians."""
    motion = se3_exp(twist)
    turned = outer_sum(c2w[..., :3], motion)
    return turned.at[..., 3].add(c2w[..., 3])


# Corrections.


def init_refinement(cameras: Cameras, *, config: NerfConfig) -> Refinement:
    """No corrections yet of the given cameras (V,), and their bases. Raises InputError for a lens that has no numbers.

    Views whose intrinsics are equal are of one camera.
    """
    refine = config.refine
    cameras = jax.tree.map(np.asarray, cameras)
    if refine.lens and not num_coefficients(cameras):
        raise InputError(
            f"--refine=lens: a lens of the model {cameras.lens and cameras.lens.model} has no coefficients to refine"
        )
    size = num_intrinsics(cameras, refine)
    _, number = np.unique(_rows(cameras), axis=0, return_inverse=True)
    number = number.reshape(-1).astype(np.int32)
    num_cameras = int(number.max()) + 1
    found = blank(len(number), num_cameras, size, config=config)
    pose_basis: Any = found.pose_basis
    camera_basis: Any = found.camera_basis
    if refine.cameras:
        information = np.asarray(_information(cameras, size=size, refine=refine), np.float64)
        if refine.poses:
            pose_basis = inverse_root(information[:, :6, :6])
        if camera_basis is not None:
            shared = [information[number == k, 6:, 6:].mean(axis=0) for k in range(num_cameras)]
            camera_basis = inverse_root(np.stack(shared))
    return dataclasses.replace(
        found,
        pose_basis=pose_basis,
        camera_basis=camera_basis,
        camera_of_view=number,  # type: ignore[arg-type]
        level_weights=level_weights(0.0, config=config),  # type: ignore[arg-type]
    )


def blank(num_views: int, num_cameras: int, size: int, *, config: NerfConfig) -> Refinement:
    """Corrections of so many views and cameras, `size` numbers a camera, all arrays zero."""
    refine, f32 = config.refine, jnp.float32
    free = Free(
        pose=jnp.zeros((num_views, 6), f32) if refine.poses else None,
        camera=jnp.zeros((num_cameras, size), f32) if size else None,
        log_gain=jnp.zeros((num_views, 3), f32) if refine.exposure else None,
    )
    return Refinement(
        free=free,
        opt_state=_adam().init(free),
        pose_basis=jnp.zeros((num_views, 6, 6), f32) if refine.poses else None,
        camera_basis=jnp.zeros((num_cameras, size, size), f32) if size else None,
        camera_of_view=jnp.zeros(num_views, jnp.int32),
        level_weights=jnp.zeros(config.field.encoding.num_levels + 1, f32),
    )


def size_of(refinement: Refinement) -> tuple[int, int, int]:
    """What `blank` takes: the numbers of views, of cameras, and of what is refined of a camera."""
    num_cameras, size = (0, 0) if refinement.free.camera is None else refinement.free.camera.shape
    return len(refinement.camera_of_view), num_cameras, size


def num_intrinsics(cameras: Cameras, refine: RefineConfig) -> int:
    """Q, how many numbers are refined of one camera."""
    return 3 * refine.focal + num_coefficients(cameras) * refine.lens


def num_coefficients(cameras: Cameras) -> int:
    """How many coefficients can be refined of the lenses given: the first of `coefficient_numbers`.

    k1 and k2 do nearly the same within half of an image, so that where the scene is in its middle both together are
    ill determined: who gave no k2 gets none.
    """
    numbers = coefficient_numbers(cameras)
    if (cameras.lens.model if cameras.lens else "perspective") not in FREE_COEFFICIENTS:
        return len(numbers)
    return 2 if cameras.lens and np.asarray(cameras.lens.coefficients)[..., numbers[1]].any() else 1


def coefficient_numbers(cameras: Cameras) -> np.ndarray:
    """Which coefficients of the lens may be refined, in the order in which they are."""
    model = cameras.lens.model if cameras.lens else "perspective"
    names = COEFFICIENTS[model]
    return np.array([names.index(name) for name in FREE_COEFFICIENTS.get(model, names)], np.int64)


def with_lens(cameras: Cameras) -> Cameras:
    """The cameras, pinholes as lenses that do not bend."""
    if cameras.lens is not None:
        return cameras
    shape, dtype = cameras.focal_xy.shape[:-1], cameras.focal_xy.dtype
    coefficients = jnp.zeros((*shape, len(COEFFICIENTS["perspective"])), dtype)
    lens = Lens(coefficients, jnp.full(shape, 1.5, dtype), jnp.full(shape, 2.0, dtype), "perspective")
    return cameras.replace(lens=lens)  # type: ignore[attr-defined]


def changed(cameras: Cameras, change: jax.Array, *, refine: RefineConfig) -> Cameras:
    """Cameras (...) with other poses and intrinsics. change (..., 6 + Q): a twist, then as `Free.camera` says."""
    if refine.poses:
        cameras = cameras.replace(c2w=moved(cameras.c2w, change[..., :6]))  # type: ignore[attr-defined]
    change = change[..., 6:]
    if refine.focal:
        centre = cameras.centre_xy + change[..., 1:3] * cameras.focal_xy
        focal = cameras.focal_xy * jnp.exp(change[..., :1])
        cameras = cameras.replace(focal_xy=focal, centre_xy=centre)  # type: ignore[attr-defined]
        change = change[..., 3:]
    if refine.lens:
        numbers, cameras = coefficient_numbers(cameras)[: change.shape[-1]], with_lens(cameras)
        assert cameras.lens is not None
        lens = dataclasses.replace(cameras.lens, coefficients=cameras.lens.coefficients.at[..., numbers].add(change))
        cameras = cameras.replace(lens=lens)  # type: ignore[attr-defined]
    return cameras


def changes(refinement: Refinement) -> jax.Array:
    """(V, 6 + Q): what the corrections change of each view, as `changed` takes it."""
    free, views = refinement.free, refinement.camera_of_view
    parts = [jnp.zeros((len(views), 6), jax.tree.leaves(free)[0].dtype)]
    if free.pose is not None and refinement.pose_basis is not None:
        parts = [jnp.sum(refinement.pose_basis * free.pose[:, None], axis=-1)]
    if free.camera is not None and refinement.camera_basis is not None:
        parts.append(jnp.sum(refinement.camera_basis * free.camera[:, None], axis=-1)[views])
    return jnp.concatenate(parts, axis=1)


def corrected(cameras: Cameras, refinement: Refinement, *, refine: RefineConfig) -> Cameras:
    """The given cameras (V,) with the corrections. Differentiable in `refinement.free`."""
    if not refine.cameras:
        return cameras
    return changed(jax.tree.map(jnp.asarray, cameras), changes(refinement), refine=refine)


# The preconditioner.

_GRID = (np.arange(6) + 0.5) / 6  # places along an image
_DISTANCES = (0.7, 1.0, 1.4)  # of points, in distances from the middle of the scene


@functools.partial(jax.jit, static_argnames=("size", "refine"))
def _information(cameras: Cameras, *, size: int, refine: RefineConfig) -> jax.Array:
    """(V, 6 + Q, 6 + Q): the mean of J^T J over points before each camera, J of places in focal lengths. size: Q."""
    full = dataclasses.replace(refine, poses=True)

    def one(camera: Cameras) -> jax.Array:
        u, v = jnp.meshgrid(_GRID, _GRID)
        xy = jnp.stack([u, v], axis=-1).reshape(-1, 2) * camera.size
        rays = unproject(jax.tree.map(lambda a: jnp.broadcast_to(a, (len(xy), *a.shape)), camera), xy)
        distance = jnp.maximum(jnp.linalg.norm(camera.c2w[:, 3] - 0.5), 0.05)
        points = jnp.concatenate([rays.origin + d * distance * rays.direction for d in _DISTANCES])

        def places(change: jax.Array) -> jax.Array:
            other = changed(camera, change, refine=full)
            many = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(points), *a.shape)), other)
            return project(many, points)[0] / camera.focal_xy

        jacobian = jax.jacfwd(places)(jnp.zeros(6 + size, jnp.float32))
        return jnp.einsum("nai,naj->ij", jacobian, jacobian, precision="highest") / len(points)

    return jax.vmap(one)(cameras)


def inverse_root(information: np.ndarray) -> Any:
    """(..., Q, Q) f32: (A + DAMPING diag A)^(-1/2) of symmetric matrices A (..., Q, Q) f64."""
    diagonal = np.eye(information.shape[-1]) * np.diagonal(information, axis1=-2, axis2=-1)[..., None, :]
    values, vectors = np.linalg.eigh(information + DAMPING * diagonal)
    return ((vectors / np.sqrt(np.maximum(values, 1e-12))[..., None, :]) @ np.swapaxes(vectors, -1, -2)).astype(
        np.float32
    )


def pose_basis(camera: Cameras) -> np.ndarray:
    """The basis (6, 6) f32 of a single camera's twists, in which a step of 1 moves its image by one focal length."""
    cameras: Cameras = jax.tree.map(lambda a: np.asarray(a)[None], camera)
    return inverse_root(np.asarray(_information(cameras, size=0, refine=RefineConfig(poses=True)), np.float64))[0]


# Exposure.


def log_gain(refinement: Refinement) -> jax.Array | None:
    """(V, 3): the logarithm of each view's gain on linear light, of mean 0 over the views; None if not refined."""
    gain = refinement.free.log_gain
    return None if gain is None else gain - jnp.mean(gain, axis=0)


def exposed(rgb: ArrayLike, opacity: ArrayLike, background: ArrayLike, gain: ArrayLike) -> jax.Array:
    """Colours (..., 3) sRGB over a background, as a photograph shows them whose log gain is (..., 3). opacity (...).

    The gain is on linear light of the scene, and what is brighter than white is white. The background, which no camera
    saw, keeps its colour.
    """
    rgb, opacity, background, gain = map(jnp.asarray, (rgb, opacity, background, gain))
    opacity = opacity[..., None]
    behind = (1 - opacity) * background
    cover = jnp.maximum(opacity, 1e-3)
    colour = jnp.maximum((rgb - behind) / cover, 0)
    return jnp.minimum(encode_srgb(decode_srgb(colour) * jnp.exp(gain)), 1) * cover + behind


def decode_srgb(value: jax.Array) -> jax.Array:
    """sRGB (...) >= 0 to linear light."""
    return jnp.where(value <= 0.04045, value / 12.92, ((jnp.maximum(value, 0.04045) + 0.055) / 1.055) ** 2.4)


def encode_srgb(light: jax.Array) -> jax.Array:
    """Linear light (...) >= 0 to sRGB, above 1 too."""
    return jnp.where(light <= 0.0031308, light * 12.92, 1.055 * jnp.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


# The curriculum.


def level_weights(fraction: float, *, config: NerfConfig) -> np.ndarray:
    """(L + 1,) f32: what levels and direction count when a fraction of the budget is spent; 1 from `fine_at` on.

    Levels open from coarse to fine while cameras move. While exposures are found the viewing direction counts only in
    the second half of that time: a colour that depends on it explains a picture's exposure as well.
    """
    refine, num_levels = config.refine, config.field.encoding.num_levels
    done = min(fraction / refine.fine_at, 1.0) if refine.fine_at else 1.0
    share = np.ones(num_levels + 1)
    if refine.cameras:
        coarse = min(refine.coarse_levels, num_levels)
        share[:-1] = coarse + (num_levels - coarse) * done - np.arange(num_levels)
    if refine.exposure:
        share[-1] = 2 * done - 1
    return ((1 - np.cos(np.pi * np.clip(share, 0, 1))) / 2).astype(np.float32)


def weighted(params: dict[str, Any], refinement: Refinement | None, *, grid: HashGridConfig) -> dict[str, Any]:
    """Parameters of a field in which features of levels, and of the direction, count by their weights.

    Features are linear in the rows of their level, and what a layer makes of the direction is linear in rows of its
    kernel: those are scaled. With weights of 1 it is the field as it is, exactly. Without a refinement nothing changes.
    """
    if refinement is None:
        return params
    weights = refinement.level_weights
    first = params["colour_mlp"]["Dense_0"]
    kernel, num_geometry = first["kernel"], params["density_mlp"][_last_layer(params["density_mlp"])]["kernel"].shape[1]
    rows_of_direction = np.arange(len(kernel)) >= num_geometry
    first = first | {"kernel": kernel * jnp.where(rows_of_direction, weights[-1], 1)[:, None]}
    rows = jnp.concatenate([jnp.full(size, weights[level]) for level, size in enumerate(level_sizes(grid))])
    table = {"table": params["encoding"]["table"] * rows[:, None]}
    return params | {"encoding": table, "colour_mlp": params["colour_mlp"] | {"Dense_0": first}}


def _last_layer(mlp: dict[str, Any]) -> str:
    return f"Dense_{len(mlp) - 1}"


# Optimising.


def rates(field: np.ndarray, fractions: np.ndarray, *, config: NerfConfig) -> Rates:
    """The rates of steps (K,) at which fractions (K,) of the budget are spent. field (K,): those of the field."""
    refine = config.refine
    falling = refine.final ** np.minimum(fractions / refine.end, 1)
    falling = falling if refine.final else np.maximum(1 - fractions / refine.end, 0)
    return Rates(
        field=field,  # type: ignore[arg-type]
        cameras=(refine.learning_rate * falling).astype(np.float32),  # type: ignore[arg-type]
        exposure=(refine.exposure_rate * falling).astype(np.float32),  # type: ignore[arg-type]
        level_weights=level_weights(float(fractions[0]), config=config),  # type: ignore[arg-type]
    )


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-15)


def update(refinement: Refinement | None, gradient: Free | None, cameras: jax.Array, exposure: jax.Array) -> Refinement:
    """One step of Adam at the rates () of cameras and of exposure; none where the gradient is non-finite."""
    assert refinement is not None
    finite = jnp.isfinite(sum(jnp.sum(jnp.abs(array)) for array in jax.tree.leaves(gradient)))
    updates, opt_state = _adam().update(gradient, refinement.opt_state)
    rate = Free(pose=cameras, camera=cameras, log_gain=exposure)
    free = Free(
        *(
            None if value is None else value - getattr(rate, name) * getattr(updates, name)
            for name, value in vars(refinement.free).items()
        )
    )
    old, new = (refinement.free, refinement.opt_state), (free, opt_state)
    free, opt_state = jax.tree.map(functools.partial(jnp.where, finite), new, old)
    return dataclasses.replace(refinement, free=free, opt_state=opt_state)


# The gauge.


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """position -> scale rotation position + translation, in f64."""

    scale: float
    rotation: np.ndarray  # (3, 3)
    translation: np.ndarray  # (3,)

    def poses(self, c2w: ArrayLike) -> np.ndarray:
        """Poses (..., 3, 4) f64 moved along; their axes keep unit length."""
        c2w = np.asarray(c2w, np.float64)
        position = self.scale * c2w[..., 3] @ self.rotation.T + self.translation
        return np.concatenate([self.rotation @ c2w[..., :3], position[..., None]], axis=-1)

    @property
    def inverse(self) -> Similarity:
        return Similarity(1 / self.scale, self.rotation.T, -(self.rotation.T @ self.translation) / self.scale)


def align(c2w: ArrayLike, target: ArrayLike) -> Similarity:
    """The similarity that takes poses (V, 3, 4) nearest to target (V, 3, 4): centres and axes together.

    Least squares (Umeyama 1991), each view's weight then lowered by how far it lies off, three times over, so that few
    wrong views do not matter. Axes count as much as centres that are off by as many parts of the cameras' spread.
    """
    c2w, target = np.asarray(c2w, np.float64), np.asarray(target, np.float64)
    weight = np.ones(len(c2w))
    for _ in range(4):
        found = _align_once(c2w, target, weight / weight.sum())
        off = np.linalg.norm(found.poses(c2w) - target, axis=(1, 2))
        weight = 1 / np.maximum(off, np.median(off) + 1e-12)
    return found


def _align_once(c2w: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Similarity:
    a, b = c2w[:, :, 3], target[:, :, 3]
    mean_a, mean_b = weight @ a, weight @ b
    a, b = a - mean_a, b - mean_b
    spread = max(float(np.sqrt(weight @ (b**2).sum(axis=1))), 1e-12)
    size = max(float(np.sqrt(weight @ (a**2).sum(axis=1))), 1e-12)
    scattered = (weight[:, None] * b).T @ a / (spread * size)
    scattered += np.einsum("v,vij,vkj->ik", weight, target[:, :, :3], c2w[:, :, :3])
    u, _, vt = np.linalg.svd(scattered)
    rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
    scale = float(np.sum(weight[:, None] * b * (a @ rotation.T))) / size**2 if size > 1e-9 else 1.0
    scale = scale if scale > 1e-6 else 1.0
    return Similarity(scale, rotation, mean_b - scale * rotation @ mean_a)


def placed_cameras(cameras: Cameras, given: Cameras, refined: Cameras) -> Cameras:
    """Any cameras of a scene whose training views were `given` and are now `refined`, as numpy arrays.

    A training view is its refined one. Any other keeps the pose it was given, moved along with the gauge: by the
    similarity that takes given poses to refined ones. Its intrinsics are those of a training view that had equal ones.
    """
    cameras, given, refined = jax.tree.map(np.asarray, (cameras, given, refined))
    back = align(refined.c2w, given.c2w).inverse
    placed = cameras.replace(c2w=back.poses(cameras.c2w).astype(np.float32))  # type: ignore[attr-defined]
    if refined.lens is not None:
        placed = jax.tree.map(np.asarray, with_lens(placed))
    optics, poses = _rows(given), {c2w.tobytes(): view for view, c2w in enumerate(given.c2w)}
    known = {row.tobytes(): view for view, row in enumerate(optics)}
    for view, row in enumerate(_rows(cameras)):
        if (same := known.get(row.tobytes())) is not None:
            own = poses.get(cameras.c2w[view].tobytes())
            pose = placed.c2w[view] if own is None else refined.c2w[own]
            placed = jax.tree.map(functools.partial(_with_row, view), placed, refined[same].replace(c2w=pose))  # type: ignore[attr-defined]
    return placed


def _rows(cameras: Cameras) -> np.ndarray:
    """The intrinsics (V, ...) of cameras, one row each."""
    lens = [cameras.lens.coefficients] if cameras.lens else []
    return np.concatenate([cameras.focal_xy, cameras.centre_xy, cameras.size, *lens], axis=1, dtype=np.float32)


def _with_row(number: int, rows: np.ndarray, row: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    rows[number] = row
    return rows


def pose_errors(c2w: ArrayLike, target: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Angles in degrees (V,) and distances (V,) between poses (V, 3, 4), as they stand."""
    c2w, target = np.asarray(c2w, np.float64), np.asarray(target, np.float64)
    # From the chord, which keeps its digits at small angles where a cosine has none.
    chord = np.linalg.norm(c2w[..., :3] - target[..., :3], axis=(-2, -1)) / np.sqrt(8)
    return np.degrees(2 * np.arcsin(np.clip(chord, 0, 1))), np.linalg.norm(c2w[..., 3] - target[..., 3], axis=-1)


# What a run keeps, and says.

DIVERGED = 10.0
"""Degrees by which half of the cameras have turned, where refinement has gone wrong."""


def divergence(refinement: Refinement, *, step: int, config: NerfConfig) -> dict[str, str]:
    """A warning while a run trains, by its name, where half of the cameras have gone far."""
    if refinement.free.pose is None:
        return {}
    twist = np.einsum("vij,vj->vi", np.asarray(refinement.pose_basis), np.asarray(refinement.free.pose))
    turned = float(np.degrees(np.median(np.linalg.norm(twist[:, 3:], axis=1))))
    if turned < DIVERGED:
        return {}
    return {
        "diverged": (
            f"step {step}: half of the cameras have turned by more than {turned:.1f} degrees; refinement diverges. "
            f"Train from scratch with a lower refine.learning_rate than {config.refine.learning_rate:g}, by --override"
        )
    }


def refined_cameras(cameras: Cameras, refinement: Refinement, *, refine: RefineConfig) -> Cameras:
    """`corrected`, as numpy arrays, with lenses whose reach is that of their new coefficients."""
    found: Cameras = jax.tree.map(np.asarray, corrected(cameras, refinement, refine=refine))
    if found.lens is None or not (refine.lens or refine.focal):
        return found
    shape = {"focal_xy": found.focal_xy, "centre_xy": found.centre_xy, "size": found.size}
    return found.replace(lens=make_lens(found.lens.model, found.lens.coefficients, **shape)[0])  # type: ignore[attr-defined]
