"""The loss of a NeRF is differentiable in poses, intrinsics and lens: reverse mode against differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import make_camera, poses_around
from strategies import TINY_FIELD, TINY_GRID

from jaxngp.cameras import Cameras
from jaxngp.config import MarchConfig, NerfConfig, OccupancyConfig, StratifiedConfig, TrainConfig
from jaxngp.fields import RadianceField
from jaxngp.lenses import COEFFICIENTS, Lens, Model, make_lens
from jaxngp.occupancy import init_occupancy
from jaxngp.training.loop import init_state
from jaxngp.training.nerf import PixelBatch, StepNoise, nerf_loss

NUM_RAYS, SIZE = 24, 20
FIELD = replace(TINY_FIELD, encoding=replace(TINY_GRID, smoothstep=True, init_scale=0.5))
MARCH = MarchConfig(num_steps=32, num_samples=2**10, occupancy=OccupancyConfig(resolution=32))
GROWING = replace(MARCH, growth=0.1, occupancy=replace(MARCH.occupancy, num_cascades=2))
SAMPLERS = {"march": MARCH, "bins": StratifiedConfig(num_bins=16, near=1.2, far=2.4), "growing": GROWING}
BENT: dict[str, Model | None] = {"march": None, "bins": "perspective", "growing": "fisheye"}
STEP = 1e-7
"""So short that hardly any sample crosses the face of a cell in between, and far above float64's rounding."""


def in_doubles(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, jax.tree.map(jnp.asarray, tree))


def make_loss(sampler: MarchConfig | StratifiedConfig) -> Callable[[Cameras], jax.Array]:
    config = NerfConfig(field=FIELD, sampler=sampler, train=TrainConfig(num_rays=NUM_RAYS, loss="l2"))
    field = RadianceField.of(in_doubles(init_state(3, config=config).params), config=FIELD)
    rng = np.random.default_rng(0)
    batch = PixelBatch(
        view=jnp.asarray(rng.integers(0, 3, NUM_RAYS), jnp.int32),
        xy=jnp.asarray(rng.uniform(6, SIZE - 6, (NUM_RAYS, 2))),
        rgba=jnp.asarray(rng.uniform(size=(NUM_RAYS, 4))),
    )
    jitter = rng.uniform(size=(NUM_RAYS, 16) if isinstance(sampler, StratifiedConfig) else NUM_RAYS)
    noise = StepNoise(jnp.asarray(jitter), jnp.asarray(rng.uniform(size=(NUM_RAYS, 3))))
    grid = None
    if isinstance(sampler, MarchConfig):
        z, y, x = np.indices((32, 32, 32))
        middle = ((np.abs(np.stack([x, y, z]) - 15.5) < 8).all(axis=0)).reshape(1, -1)
        middle = np.repeat(middle, sampler.occupancy.num_cascades, axis=0)
        grid = in_doubles(init_occupancy(jnp.asarray(middle)))
    return jax.jit(lambda cameras: nerf_loss(field, cameras, batch, noise, grid, config=config)[0])


def bent(model: Model | None, cameras: Cameras) -> Lens | None:
    """A lens with every coefficient of a polynomial model."""
    if model is None:
        return None
    given = np.random.default_rng(2).uniform(-0.02, 0.02, (3, len(COEFFICIENTS[model])))
    shape = {"focal_xy": cameras.focal_xy, "centre_xy": cameras.centre_xy, "size": cameras.size}
    return in_doubles(make_lens(model, given, **shape)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_gradient_in_cameras_is_the_difference(name: str) -> None:
    with jax.enable_x64(True):
        loss = make_loss(SAMPLERS[name])
        cameras = in_doubles(make_camera(SIZE, SIZE, 24.0, poses_around(3, 1.8)))
        size, lens = cameras.size, bent(BENT[name], cameras)
        free = {part: getattr(cameras, part) for part in ("c2w", "focal_xy", "centre_xy")}
        free |= {"lens": lens.coefficients} if lens else {}

        def of(free: dict[str, jax.Array]) -> jax.Array:
            pinhole = {part: free[part] for part in free if part != "lens"}
            return loss(Cameras(**pinhole, size=size, lens=replace(lens, coefficients=free["lens"]) if lens else None))

        gradient = jax.grad(of)(free)
        rng = np.random.default_rng(1)
        for part, scale in {"c2w": 1.0, "focal_xy": 30.0, "centre_xy": 30.0, "lens": 1.0}.items():
            if part not in free:
                continue
            for _ in range(3):
                direction = jnp.asarray(rng.normal(size=free[part].shape)) * scale
                ahead, behind = (of(free | {part: free[part] + s * STEP * direction}) for s in (1, -1))
                expected = float(ahead - behind) / (2 * STEP)
                found = float(jnp.sum(gradient[part] * direction))
                assert abs(expected) > 1e-6, part
                # Of a piecewise smooth function; a missing term would show in the first digit.
                np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=part)
