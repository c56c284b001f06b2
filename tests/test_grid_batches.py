"""What walks over the grid in loops: a batch under vmap gives what its members give, and 64-bit mode changes no bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scenes import BALL, make_camera, photograph, poses_around
from strategies import TINY_MARCH

from jaxngp import marching, occupancy
from jaxngp.cameras import Rays
from jaxngp.visual_hull import visual_hull

R = 32
CONFIG = replace(TINY_MARCH, num_samples=R * TINY_MARCH.num_steps)
Case = tuple[Callable[..., Any], tuple]
"""A jitted function, compiled once however many tests call it, and the arguments of two calls, on the host."""


def case(function: Callable[..., Any], *args: Any) -> Case:
    return jax.jit(function), jax.device_get(args)


grids_of = jax.jit(jax.vmap(occupancy.init_occupancy))


@functools.cache
def march() -> Case:
    """One batch needs more rounds than the other: it crosses the whole cube, the other a corner of it."""
    rng = np.random.default_rng(0)
    origin = np.stack([np.full((R, 3), -0.2), np.full((R, 3), 1.1)])
    target = np.stack([rng.uniform(0.3, 0.7, (R, 3)), rng.uniform([0.9, 0.9, 0.4], [1, 1, 1], (R, 3))])
    direction = (target - origin) / np.linalg.norm(target - origin, axis=-1, keepdims=True)
    rays = Rays(*(a.astype(np.float32) for a in (origin, direction)))
    flags = rng.uniform(size=(2, 3, 32**3)) < 0.3
    flags[1] &= np.arange(32**3) >= 31 * 32**2  # bounds, too, tell how many rounds there are
    grids = grids_of(flags)
    grids = grids.replace(opaque=np.asarray(grids.occupied) & np.uint32(0x0F0F0F0F))
    jitter = rng.uniform(0, 0.99, (2, R)).astype(np.float32)
    return case(functools.partial(marching.march_rays, config=CONFIG), rays, grids, jitter)


@functools.cache
def refresh() -> Case:
    """One grid has as many candidates as fit two chunks, the other fewer than fit one and is warmed up already."""
    share = np.array([[[1.0]], [[0.01]]])
    flags = np.random.default_rng(1).uniform(size=(2, 2, 32**3)) < share
    config = replace(CONFIG, occupancy=replace(CONFIG.occupancy, num_cascades=2))

    def update(grid: occupancy.OccupancyGrid, seed: jax.Array, radius: jax.Array, warmup: jax.Array) -> Any:
        def density_fn(position: jax.Array) -> jax.Array:
            return jnp.where(jnp.sum((position - 0.5) ** 2, axis=-1) < radius**2, 50.0, position[:, 0])

        return occupancy.update_occupancy(grid, jax.random.key(seed), density_fn, warmup, config=config)

    radius, warmup = np.float32([0.2, 0.4]), np.array([True, False])
    return case(update, grids_of(flags), np.array([3, 4], np.uint32), radius, warmup)


@functools.cache
def hull() -> Case:
    """Two scenes, of which one leaves few cells and the other all that are seen, and then draws all pixels."""
    images = photograph(BALL, make_camera(24, 20, 30.0, poses_around(9, 1.6)))
    opaque = np.full_like(images.rgba, 255)
    two = jax.tree.map(lambda a: np.stack([a, a]), images).replace(rgba=np.stack([images.rgba, opaque]))
    return case(functools.partial(visual_hull, config=CONFIG.occupancy), two)


@pytest.mark.parametrize("case", [march, refresh, hull])
def test_a_batch_of_two_gives_the_two_results(case: Callable[[], Case]) -> None:
    function, args = case()
    batch = jax.device_get(jax.jit(jax.vmap(function))(*args))
    for i in range(2):
        expected = function(*jax.tree.map(lambda a, i=i: a[i], args))
        jax.tree.map(lambda b, e, i=i: np.testing.assert_array_equal(b[i], e), batch, expected)


@pytest.mark.parametrize("case", [march, refresh, hull])
def test_a_batch_goes_through_its_loops_together(case: Callable[[], Case]) -> None:
    """Loops that end at different rounds within a batch would have each round select all that it carries."""
    function, args = case()
    shapes = predicate_shapes(jax.make_jaxpr(jax.vmap(function))(*args).jaxpr)
    assert shapes
    assert set(shapes) == {()}


def predicate_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of what while loops ask before each round."""
    shapes = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            shapes += [aval.shape for aval in eqn.params["cond_jaxpr"].out_avals]
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                shapes += predicate_shapes(inner)
    return shapes


@pytest.mark.parametrize("case", [march, refresh])
def test_64_bit_mode_changes_no_bit(case: Callable[[], Case]) -> None:
    function, args = case()
    single = jax.tree.map(lambda a: a[0], args)
    expected = function(*single)
    with jax.enable_x64(True):
        found = function(*single)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(expected)]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
