"""From rays to samples: march through occupied cells and pack what is found (paper appendix E.1), or fill bins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.cameras import Rays
from jaxngp.config import MarchConfig, StratifiedConfig
from jaxngp.device import fusion_barrier
from jaxngp.occupancy import OccupancyGrid, bit_at, even_bits, interleave, nth_set_bit, pair_at

Bound = float | jax.Array
"""A corner of a box: one number for all axes, or (3,)."""

_MARGIN = 1e-5
"""By which rounding may move the place where a ray enters the grid's bounds, in scene units."""


@struct.dataclass
class Samples:
    """N samples of R rays, packed: those of one ray stand together, in order of t; rays in order.

    t (N,), dt (N,) scene units; ray (N,) i32, sorted; valid (N,) bool, False in the unused end of the buffer;
    ray_complete (R,) bool: all samples of this ray are here; num_samples () i32: how many are valid; num_dropped ()
    i32: samples that did not fit.
    """

    t: jax.Array
    dt: jax.Array
    ray: jax.Array
    valid: jax.Array
    ray_complete: jax.Array
    num_samples: jax.Array
    num_dropped: jax.Array


@struct.dataclass
class Candidates:
    """The steps of R rays that fall into occupied cells.

    words (R, S / 32) u32: bit i % 32 of word i // 32 stands for the step from t_start + i dt to t_start + (i + 1) dt.
    Before t_start there are none.
    """

    words: jax.Array
    t_start: jax.Array  # (R,)


def box_interval(rays: Rays, low: Bound = 0.0, high: Bound = 1.0) -> tuple[jax.Array, jax.Array]:
    """Where rays are inside a box, the unit cube if not told: t_near >= 0 and t_far, each (...).

    t_far <= t_near if they miss it. By slabs (Kay and Kajiya 1986). A component of the direction that is nearly 0
    counts as tiny: then the two planes lie far away on either side, or, for an origin outside them, both on one side.
    """
    direction = rays.direction
    tiny = jnp.where(direction < 0, -1e-12, 1e-12)
    inverse = 1 / jnp.where(jnp.abs(direction) < 1e-12, tiny, direction)
    t0, t1 = (low - rays.origin) * inverse, (high - rays.origin) * inverse
    t_near = jnp.maximum(jnp.max(jnp.minimum(t0, t1), axis=-1), 0)
    return t_near, jnp.min(jnp.maximum(t0, t1), axis=-1)


def find_candidates(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, *, config: MarchConfig) -> Candidates:
    """Test the steps of R rays against the grid. jitter (R,) in [0, 1): where in its step a sample lies."""
    t_start, (occupied,) = _test_steps(rays, grid, (grid.occupied,), jitter, config)
    return Candidates(words=occupied, t_start=t_start)


def find_visible(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, *, config: MarchConfig) -> Candidates:
    """`find_candidates` without the steps behind the first `opaque_cells` widths of opaque cells.

    Half of the samples in occupied cells lie behind a surface, where they cost as much as any other and learn
    nothing. What is opaque is read off the grid, so this is a guess, and the length is counted in cells so that no
    single cell, which may be opaque only in part, ends a ray. Rendering makes no guess.
    """
    if config.opaque_steps == 0:
        return find_candidates(rays, grid, jitter, config=config)
    t_start, (occupied, opaque) = _test_steps(rays, grid, (grid.occupied, grid.opaque), jitter, config)
    return Candidates(words=occupied & until_nth(opaque, config.opaque_steps), t_start=t_start)


def _test_steps(
    rays: Rays, grid: OccupancyGrid, sets: tuple[jax.Array, ...], jitter: jax.Array, config: MarchConfig
) -> tuple[jax.Array, list[jax.Array]]:
    """t_start (R,), and for each set of cells (G^3 / 32,) u32 the steps (R, S / 32) u32 of the rays that fall into it.

    All within the cube, of which only the part inside the grid's bounds is tested. Steps are counted from the last
    one, of all that start where the ray enters the cube, that begins before those bounds.
    """
    t_near, t_far = box_interval(rays)
    rays, jitter, t_far = lax.stop_gradient((rays, jitter, t_far))  # bits have no derivative; t_start has
    t_enter, t_leave = box_interval(rays, grid.bounds[0], grid.bounds[1])
    t_enter, t_leave = t_enter - _MARGIN, jnp.minimum(t_leave + _MARGIN, t_far)
    skipped = jnp.floor(jnp.maximum(t_enter - lax.stop_gradient(t_near), 0) / config.step_size)
    t_start = t_near + skipped * config.step_size
    first_t = lax.stop_gradient(t_start)
    cells = sets[0] if len(sets) == 1 else interleave(*sets)

    def words(first: jax.Array, count: int) -> list[jax.Array]:
        """(R, count) u32 for each set: the words from the given one on. No (R, S, 3) array of positions is stored."""
        step = first * 32 + jnp.arange(count * 32)
        t = first_t[:, None] + (step + jitter[:, None]) * config.step_size
        x, y, z = (rays.origin[:, axis, None] + t * rays.direction[:, axis, None] for axis in range(3))
        inside = t < t_leave[:, None]
        if len(sets) == 1:
            found = jnp.where(inside, bit_at(cells, x, y, z, resolution=grid.resolution), 0).reshape(-1, count, 32)
            return [jnp.sum(found << np.arange(32, dtype=np.uint32), axis=-1, dtype=jnp.uint32)]
        # Two sets in one pass: one read and two bits a step, 16 steps a word, taken apart afterwards.
        found = jnp.where(inside, pair_at(cells, x, y, z, resolution=grid.resolution), 0).reshape(-1, count, 2, 16)
        halves = jnp.sum(found << (2 * np.arange(16, dtype=np.uint32)), axis=-1, dtype=jnp.uint32)
        apart = [even_bits(halves >> i) for i in range(2)]
        return [half[..., 0] | (half[..., 1] << 16) for half in apart]

    def as_loop(*_: jax.Array) -> list[jax.Array]:
        """Word by word, and none beyond the last that any ray needs."""
        longest = jnp.max(jnp.maximum(t_leave - first_t, 0), initial=0.0)
        needed = jnp.minimum(jnp.ceil(longest / (32 * config.step_size)).astype(jnp.int32), config.num_steps // 32)

        def one(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
            new = fusion_barrier(lambda _: words(i, 1), first_t)  # fused into what follows, it would keep one core busy
            return [lax.dynamic_update_slice(f, w.T, (i, jnp.int32(0))) for f, w in zip(found, new, strict=True)]

        empty = jnp.zeros((config.num_steps // 32, len(jitter)), jnp.uint32)
        return [f.T for f in lax.fori_loop(0, needed, one, [empty] * len(sets))]

    def at_once(*_: jax.Array) -> list[jax.Array]:
        return words(jnp.int32(0), config.num_steps // 32)

    return t_start, lax.platform_dependent(cpu=as_loop, default=at_once)


def until_nth(words: jax.Array, n: int) -> jax.Array:
    """All bits up to the n-th (counted from 1) that is set in each row of words (R, W), or all if there is none."""
    count, end = lax.population_count(words).astype(jnp.int32), count_steps(words)
    place = nth_set_bit(words, jnp.clip(n - 1 - (end - count), 0, 31))
    ending = (np.uint32(2) << place) - 1
    return jnp.where(end < n, np.uint32(0xFFFFFFFF), jnp.where(end - count < n, ending, np.uint32(0)))


def march_rays(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, *, config: MarchConfig) -> Samples:
    """The samples of R rays in occupied cells that no opaque ones hide, packed into a buffer of config.num_samples.

    One jitter a ray keeps its samples a fixed distance apart, so that their intervals tile the way through the box.
    """
    return pack_steps(find_visible(rays, grid, jitter, config=config), jitter, config=config)


def pack_steps(candidates: Candidates, jitter: jax.Array, *, config: MarchConfig) -> Samples:
    """The steps of R rays as samples, one after the other in a buffer of config.num_samples.

    Rays are taken in order while all of their samples fit; the samples of the others are counted as dropped.
    """
    size, num_rays = config.num_samples, len(jitter)
    ends = count_steps(candidates.words)
    counts = ends[:, -1]
    end = jnp.cumsum(counts)
    complete = end <= size
    num_kept = jnp.max(jnp.where(complete, end, 0))

    slot = jnp.arange(size, dtype=jnp.int32)
    ray = jnp.cumsum(jnp.zeros(size, jnp.int32).at[end].add(1, mode="drop", indices_are_sorted=True))
    ray = jnp.minimum(ray, num_rays - 1)
    step = nth_candidate(candidates.words, ends, ray, slot - (end - counts)[ray])
    valid = slot < num_kept
    return Samples(
        t=candidates.t_start[ray] + (step + jitter[ray]) * config.step_size,
        dt=jnp.where(valid, config.step_size, 0.0),
        ray=ray,
        valid=valid,
        ray_complete=complete,
        num_samples=num_kept,
        num_dropped=end[-1] - num_kept,
    )


def count_steps(words: jax.Array) -> jax.Array:
    """For words (R, W) u32, how many steps are set in each and those before it, (R, W) i32."""
    return jnp.cumsum(lax.population_count(words).astype(jnp.int32), axis=1)


def nth_candidate(words: jax.Array, ends: jax.Array, ray: jax.Array, n: jax.Array) -> jax.Array:
    """The number of the n-th step (counted from 0) that is set for a ray; some valid step where it has no n-th.

    words (R, W) u32 and ends = count_steps(words), ray (N,) i32, n (N,) i32 -> (N,) i32.
    """
    num_words = words.shape[1]
    word = jnp.zeros_like(ray)
    for width in (1 << b for b in reversed(range((num_words - 1).bit_length()))):
        # The words before `word + width` hold no more than n set steps: go on behind them.
        middle = jnp.minimum(word + width, num_words - 1)
        word = jnp.where(ends[ray, middle - 1] <= n, middle, word)
    before = jnp.where(word > 0, ends[ray, word - 1], 0)
    return word * 32 + nth_set_bit(words[ray, word], jnp.clip(n - before, 0, 31)).astype(jnp.int32)


def stratified_samples(num_rays: int, jitter: jax.Array, *, config: StratifiedConfig) -> Samples:
    """One sample per bin and ray, as the 100-line reference takes them. jitter (R, num_bins) in [0, 1).

    Bins are bounded by the midpoints between evenly spaced points from near to far; dt reaches to the next sample.
    """
    edges = jnp.linspace(config.near, config.far, config.num_bins)
    middles = (edges[1:] + edges[:-1]) / 2
    lower, upper = jnp.concatenate([edges[:1], middles]), jnp.concatenate([middles, edges[-1:]])
    t = lower + (upper - lower) * jitter
    dt = jnp.concatenate([jnp.diff(t, axis=1), jnp.full((num_rays, 1), config.last_interval)], axis=1)
    return Samples(
        t=t.reshape(-1),
        dt=dt.reshape(-1),
        ray=jnp.repeat(jnp.arange(num_rays, dtype=jnp.int32), config.num_bins),
        valid=jnp.ones(t.size, bool),
        ray_complete=jnp.ones(num_rays, bool),
        num_samples=jnp.int32(t.size),
        num_dropped=jnp.int32(0),
    )


def jitter_shape(num_rays: int, *, sampler: MarchConfig | StratifiedConfig) -> tuple[int, ...]:
    """The shape of the uniform noise that `sample_rays` takes."""
    return (num_rays,) if isinstance(sampler, MarchConfig) else (num_rays, sampler.num_bins)


def sample_rays(
    rays: Rays, grid: OccupancyGrid | None, jitter: jax.Array, *, sampler: MarchConfig | StratifiedConfig
) -> Samples:
    """Samples of R rays as `sampler` says; only marching needs the grid."""
    if isinstance(sampler, StratifiedConfig):
        return stratified_samples(rays.origin.shape[0], jitter, config=sampler)
    if grid is None:
        raise ValueError("grid = None: marching needs an OccupancyGrid")
    return march_rays(rays, grid, jitter, config=sampler)
