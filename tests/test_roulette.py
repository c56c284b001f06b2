"""Which steps that are looked at become samples, and how long: a roulette that keeps the mean of sums over a ray."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from strategies import TINY_MARCH, floats32, seeds

from jaxngp.cameras import Rays
from jaxngp.config import MarchConfig
from jaxngp.marching import ROULETTE_UNITS, Samples, draw_samples, find_visible, march_rays, pack_steps
from jaxngp.occupancy import OccupancyGrid, init_occupancy

R = 8
CONFIG = replace(TINY_MARCH, num_samples=R * TINY_MARCH.num_steps, num_candidates=R * TINY_MARCH.num_steps)
ROULETTE = replace(CONFIG, roulette=0.05)
DT = CONFIG.step_size
OFFSETS = np.arange(ROULETTE_UNITS)


def haze(thickness: jax.Array, position: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Steps of up to a thickness, most of them of much less, and behind x = 0.7 a wall."""
    wave = jnp.abs(jnp.sin(position @ jnp.array([31.0, 17.0, 23.0])))
    return jnp.where(position[:, 0] > 0.7, 8.0, thickness * wave**4) / DT, 0 * direction


@functools.partial(jax.jit, static_argnames="config")
def drawn(
    seed: np.uint32,
    thickness: jax.Array,
    offset: jax.Array,
    jitter: jax.Array | None = None,
    *,
    config: MarchConfig = ROULETTE,
) -> tuple[Samples, Samples, jax.Array]:
    """The steps of R rays along x that are looked at, their samples for each offset (K,), and their thicknesses."""
    rays, grid, own = some_rays(seed)
    jitter = own if jitter is None else jitter
    field = jax.tree_util.Partial(haze, thickness)
    looked_at = pack_steps(find_visible(rays, grid, jitter, config=config), size=config.num_candidates)
    samples = jax.vmap(lambda offset: draw_samples(looked_at, rays, field, offset, config=config))(offset)
    position = rays.origin[looked_at.ray] + looked_at.t[:, None] * rays.direction[looked_at.ray]
    return looked_at, samples, haze(thickness, position, position)[0] * looked_at.dt


def some_rays(seed: int) -> tuple[Rays, OccupancyGrid, jax.Array]:
    """Along x, through cells of which two thirds are occupied."""
    keys = jax.random.split(jax.random.key(seed), 3)
    origin = jax.random.uniform(keys[0], (R, 3)).at[:, 0].set(-1.0)
    grid = init_occupancy(jax.random.bernoulli(keys[1], 0.67, (CONFIG.occupancy.resolution**3,)))
    return Rays(origin, jnp.tile(jnp.array([1.0, 0, 0]), (R, 1))), grid, jax.random.uniform(keys[2], (R,))


def of_ray(looked_at: Samples, thickness: np.ndarray, ray: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, weight and optical depth before each step of a ray, by the definition in float64."""
    own = np.asarray(looked_at.valid) & (np.asarray(looked_at.ray) == ray)
    thickness = np.asarray(thickness, np.float64)[own]
    before = np.concatenate([[0.0], np.cumsum(thickness)[:-1]])
    return np.asarray(looked_at.t)[own], np.exp(-before) * -np.expm1(-thickness), before


@settings(max_examples=10)
@given(seeds, floats32(0, 0.5))
def test_each_step_is_as_long_as_it_is_rare(seed: int, thickness: float) -> None:
    """Over all offsets: drawn with probability min(1, weight / roulette) to a unit, and its mean length is dt."""
    looked_at, samples, thicknesses = drawn(np.uint32(seed), thickness, OFFSETS)
    t, dt, valid = (np.asarray(a) for a in (samples.t, samples.dt, samples.valid))
    for ray in range(R):
        own = valid & (np.asarray(samples.ray) == ray)
        steps, weight, before = of_ray(looked_at, thicknesses, ray)
        reached = before < -np.log(CONFIG.min_transmittance) - 5e-3
        for place, expected in zip(steps[reached], weight[reached], strict=True):
            found = own & (t == place)
            probability = found.sum() / ROULETTE_UNITS
            units = min(ROULETTE_UNITS, max(1, expected / ROULETTE.roulette * ROULETTE_UNITS))
            # Rounded up to a unit. The phase of the wave, 71 rad, is known to 8e-6, and so the depth before a step to
            # less than 4e-4, which is a tenth of a unit of a step that is drawn by half or more.
            assert units - 0.5 <= probability * ROULETTE_UNITS <= units + 1.5
            np.testing.assert_allclose(dt[found], DT / probability, rtol=1e-5)
        assert set(t[own]) <= set(steps)


@settings(max_examples=10)
@given(seeds, floats32(0, 0.5))
def test_a_ray_has_the_samples_it_has_probability(seed: int, thickness: float) -> None:
    """To one more or less, whatever the offset; so many steps that each is faint do not vanish together."""
    looked_at, samples, thicknesses = drawn(np.uint32(seed), thickness, OFFSETS)
    for ray in range(R):
        _, weight, before = of_ray(looked_at, thicknesses, ray)
        lit = weight[before < -np.log(CONFIG.min_transmittance)]
        units = np.minimum(ROULETTE_UNITS, np.ceil(lit / ROULETTE.roulette * ROULETTE_UNITS))
        counts = np.sum(np.asarray(samples.valid & (samples.ray == ray)), axis=1)
        # A unit more or less a step by rounding, and one a step at the edge of what light reaches.
        assert (np.abs(counts - units.sum() / ROULETTE_UNITS) < 1 + (len(lit) + 1) / ROULETTE_UNITS).all()


def test_what_does_not_fit_is_counted_and_left_out() -> None:
    """Rays in order, whole ones; and of those that fit nothing changes. With the first offset some fit exactly."""
    roomy = drawn(np.uint32(0), 0.2, OFFSETS)[1]
    ends = np.cumsum(np.bincount(np.asarray(roomy.ray)[0][np.asarray(roomy.valid)[0]], minlength=R))
    size = int(ends[ends >= CONFIG.num_steps][0])
    assert size < ends[-1]
    tight = drawn(np.uint32(0), 0.2, OFFSETS, config=replace(ROULETTE, num_samples=size))[1]
    for i in range(0, ROULETTE_UNITS, 50):
        all_of_them, few = (jax.tree.map(lambda a, i=i: np.asarray(a)[i], samples) for samples in (roomy, tight))
        counts = np.bincount(all_of_them.ray[all_of_them.valid], minlength=R)
        fits = np.cumsum(counts) <= size
        assert 0 < fits.sum() < R
        np.testing.assert_array_equal(few.ray_complete, fits)
        assert few.num_samples == counts[fits].sum()
        assert few.num_dropped == counts[~fits].sum()
        for name in ("t", "dt", "ray"):
            kept = all_of_them.valid & fits[all_of_them.ray]
            np.testing.assert_array_equal(getattr(few, name)[few.valid], getattr(all_of_them, name)[kept])
        assert (np.diff(few.ray) >= 0).all()
        assert (few.dt[~few.valid] == 0).all()


@jax.jit
def marched(jitter: jax.Array, thickness: jax.Array) -> Samples:
    """The samples of the rays of seed 0 for jitters (K, R) of theirs."""
    rays, grid, _ = some_rays(0)
    field = jax.tree_util.Partial(haze, thickness)
    return jax.vmap(lambda jitter: march_rays(rays, grid, jitter, field, config=ROULETTE))(jitter)


JITTERS = np.full((ROULETTE_UNITS, R), 0.25, np.float32)
JITTERS[:, 0] += np.arange(ROULETTE_UNITS, dtype=np.float32) * np.float32(2**-24)


def test_the_offset_is_in_the_last_bits_of_a_jitter() -> None:
    """Over all of which the lengths of samples add up, on average, to those of all steps that light reaches."""
    thickness = 0.05
    lengths = np.sum(marched(JITTERS, thickness).dt, axis=1)
    assert np.ptp(lengths) > 10 * DT
    looked_at, _, thicknesses = drawn(np.uint32(0), thickness, OFFSETS, jitter=JITTERS[0])
    before = np.concatenate([of_ray(looked_at, thicknesses, ray)[2] for ray in range(R)])
    np.testing.assert_allclose(lengths.mean(), DT * np.sum(before < -np.log(CONFIG.min_transmittance)), rtol=1e-4)


def test_a_density_that_is_no_number_is_seen() -> None:
    """Its step is a sample, so that the loss says so."""
    samples = jax.tree.map(lambda a: np.asarray(a)[0], marched(JITTERS, jnp.float32(jnp.nan)))
    assert set(samples.ray[samples.valid]) == set(range(R))
    np.testing.assert_allclose(samples.dt[samples.valid], DT, rtol=1e-6)
