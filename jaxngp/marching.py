"""From rays to samples: march through occupied cells and pack what is found (paper appendix E.1), or fill bins."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxngp.bitsets import count_bits, even_bits, interleave, nth_bit_of_row, until_nth
from jaxngp.cameras import Rays
from jaxngp.compositing import OPAQUE, optical_depth_before
from jaxngp.config import MarchConfig, StratifiedConfig
from jaxngp.device import (
    all_shares,
    any_share,
    by_device,
    fusion_barrier,
    largest,
    num_shares,
    over_shares,
    own_share,
    share_index,
)
from jaxngp.occupancy import OccupancyGrid

Field = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""position (N, 3), direction (N, 3) -> density (N,) per scene unit, rgb (N, 3); a pytree where it crosses a jit, as a
`fields.RadianceField` or a `jax.tree_util.Partial` is."""

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
class Steps:
    """The steps of rays (...), numbered from t_start on; each has one sample, a share `jitter` of it behind its start.

    A step has the length max(length, growth t), with the t where it starts. So where all steps of a ray lie follows
    from t_start and the two numbers, which are static. A pytree, for its arrays go with their rays (`steps[ray]`).
    """

    t_start: jax.Array  # (...) where step 0 begins
    jitter: jax.Array  # (...) in [0, 1)
    length: float = struct.field(pytree_node=False)  # scene units
    growth: float = struct.field(pytree_node=False, default=0.0)

    def __getitem__(self, index: Any) -> Steps:
        return jax.tree.map(lambda array: array[index], self)

    def t_at(self, step: jax.Array) -> jax.Array:
        """The t of the samples of steps (...) i32."""
        return self._t(step, self.jitter)

    def dt_at(self, step: jax.Array) -> jax.Array:
        """The lengths dt (...) f32 of steps (...) i32."""
        if not self.growth:
            return jnp.full(step.shape, self.length, jnp.float32)
        return jnp.maximum(self.length, self.growth * self._t(step, jnp.float32(0)))

    def skip_to(self, t: jax.Array) -> Steps:
        """The same steps, numbered from the last one on that begins before t (...), if that is not before the first."""
        start = lax.stop_gradient(self.t_start)
        if self.growth:
            skipped = jnp.floor(jnp.maximum(self._number(t) - self._number(start), 0)).astype(jnp.int32)
            return self.replace(t_start=self._t(skipped, jnp.float32(0)))  # type: ignore[attr-defined]
        skipped = jnp.floor(jnp.maximum(t - start, 0) / self.length)
        return self.replace(t_start=self.t_start + skipped * self.length)  # type: ignore[attr-defined]

    def num_until(self, t: jax.Array) -> jax.Array:
        """How many steps (...) i32 begin before t (...)."""
        if self.growth:
            return jnp.ceil(jnp.maximum(self._number(t) - self._number(self.t_start), 0)).astype(jnp.int32)
        return jnp.ceil(jnp.maximum(t - self.t_start, 0) / self.length).astype(jnp.int32)

    def _t(self, step: jax.Array, offset: jax.Array) -> jax.Array:
        """The t (...) at `offset` into steps (...) i32."""
        if not self.growth:
            return self.t_start + (step.astype(jnp.float32) + offset) * self.length
        # number(t) below is a line, then a logarithm. Its inverse is split into a factor of the ray and one of the
        # step, so that no exponential is taken for every step of every ray.
        number, rate = self._number(self.t_start) + offset, np.float32(np.log1p(self.growth))
        line = (number + step.astype(jnp.float32)) * self.length
        bend = self.length / self.growth
        curve = bend * jnp.exp((number - 1 / self.growth) * rate) * jnp.exp(step.astype(jnp.float32) * rate)
        return jnp.where(line < bend, line, curve)

    def _number(self, t: jax.Array) -> jax.Array:
        """How many steps (...) f32 lead from t = 0 to t (...), of which the first all have the smallest length."""
        bend = self.length / self.growth  # from here on steps grow
        beyond = jnp.log(jnp.maximum(t, bend) / bend) * (1 / np.log1p(self.growth))
        return jnp.minimum(t, bend) / self.length + beyond


@struct.dataclass
class Candidates:
    """The steps of R rays that fall into occupied cells.

    words (R, S / 32) u32: bit i % 32 of word i // 32 stands for step i. There are none before step 0.
    """

    words: jax.Array
    steps: Steps  # (R,)


def box_interval(rays: Rays, low: Bound = 0.0, high: Bound = 1.0) -> tuple[jax.Array, jax.Array]:
    """Where rays are inside a box, by default the unit cube: t_near >= 0 and t_far, each (...).

    t_far <= t_near if they miss it. By slabs (Kay and Kajiya 1986). A component of the direction that is nearly 0
    counts as tiny: then the two planes lie far away on either side, or, for an origin outside them, both on one side.

    >>> near, far = box_interval(Rays(jnp.array([0.5, 0.5, -1.0]), jnp.array([0.0, 0.0, 1.0])))
    >>> float(near), float(far)
    (1.0, 2.0)
    """
    direction = rays.direction
    tiny = jnp.where(direction < 0, np.float32(-1e-12), np.float32(1e-12))
    inverse = 1 / jnp.where(jnp.abs(direction) < 1e-12, tiny, direction)
    t0, t1 = (low - rays.origin) * inverse, (high - rays.origin) * inverse
    t_near = jnp.maximum(jnp.max(jnp.minimum(t0, t1), axis=-1), 0)
    return t_near, jnp.min(jnp.maximum(t0, t1), axis=-1)


def find_candidates(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, *, config: MarchConfig) -> Candidates:
    """Test the steps of R rays against the grid. jitter (R,) in [0, 1): where in its step a sample lies."""
    steps, (occupied,) = _test_steps(rays, grid, (grid.occupied,), jitter, config)
    return Candidates(words=occupied, steps=steps)


def find_visible(rays: Rays, grid: OccupancyGrid, jitter: jax.Array, *, config: MarchConfig) -> Candidates:
    """`find_candidates` without the steps behind the first `opaque_cells` widths of opaque cells.

    Half of the samples in occupied cells lie behind a surface, where they cost as much as any other and learn
    nothing. What is opaque is read off the grid, so this is a guess, and the length is counted in cells so that no
    single cell, which may be opaque only in part, ends a ray. Rendering makes no guess.
    """
    if config.opaque_steps == 0:
        return find_candidates(rays, grid, jitter, config=config)
    steps, (occupied, opaque) = _test_steps(rays, grid, (grid.occupied, grid.opaque), jitter, config)
    return Candidates(words=occupied & until_nth(opaque, config.opaque_steps), steps=steps)


def _test_steps(
    rays: Rays, grid: OccupancyGrid, sets: tuple[jax.Array, ...], jitter: jax.Array, config: MarchConfig
) -> tuple[Steps, list[jax.Array]]:
    """The steps (R,) of rays, and for each set of cells (K, G^3 / 32) u32 which (R, S / 32) u32 of them fall into it.

    All within the cube, of which only the part inside the grid's bounds is tested. Steps are counted from the last
    one, of all that start where the ray enters the cube, that begins before those bounds.
    """
    t_near, t_far = box_interval(rays)
    if config.near:
        t_near = jnp.maximum(t_near, config.near)
    rays, t_far = lax.stop_gradient((rays, t_far))  # bits have no derivative; t_start has
    t_enter, t_leave = box_interval(rays, grid.bounds[0], grid.bounds[1])
    t_enter, t_leave = t_enter - _MARGIN, jnp.minimum(t_leave + _MARGIN, t_far)
    steps = Steps(t_near, jitter, config.step_size, config.growth).skip_to(t_enter)
    fixed = lax.stop_gradient(steps)
    cells = sets[0] if len(sets) == 1 else interleave(*sets)

    width, num_words = len(sets), config.num_steps // 32
    # Two sets in one pass: one read and two bits a step, 16 steps a word, taken apart afterwards.

    def read(step: Any) -> jax.Array:
        """The bits (R, n) u32 of steps (n,) i32. No (R, n, 3) array of positions is stored."""
        t = fixed[:, None].t_at(step)
        x, y, z = (rays.origin[:, axis, None] + t * rays.direction[:, axis, None] for axis in range(3))
        return jnp.where(t < t_leave[:, None], grid.cells.read(cells, x, y, z, width=width), 0)

    def apart(words: jax.Array) -> list[jax.Array]:
        """(R, n) u32 for each set, of words (R, n width) that hold the bits of all sets."""
        if width == 1:
            return [words]
        halves = [even_bits(words >> i).reshape(len(words), -1, 2) for i in range(2)]
        return [half[..., 0] | (half[..., 1] << 16) for half in halves]

    def word(i: jax.Array) -> list[jax.Array]:
        """(R, 1) u32 for each set: its i-th word."""
        found = read(i * 32 + jnp.arange(32, dtype=jnp.int32)).reshape(-1, width, 32 // width)
        places = width * np.arange(32 // width, dtype=np.uint32)
        return apart(jnp.sum(found << places, axis=-1, dtype=jnp.uint32))

    def as_loop() -> list[jax.Array]:
        """Word by word, and none beyond the last that any ray needs."""
        needed = jnp.max(fixed.num_until(t_leave), initial=0)
        needed = largest(jnp.minimum((needed + 31) // 32, num_words))

        def one(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
            # Fused into what follows, it would keep one core busy.
            new = fusion_barrier(lambda _: word(i), fixed.t_start)
            return [lax.dynamic_update_slice(f, w.T, (i, jnp.int32(0))) for f, w in zip(found, new, strict=True)]

        empty = jnp.zeros((num_words, len(jitter)), jnp.uint32)
        return [f.T for f in lax.fori_loop(0, needed, one, [empty] * len(sets))]

    def unrolled() -> list[jax.Array]:
        """16 steps by a thread, one after the other: a sum over an axis would spend most of its time on adding up."""
        start = 16 * np.arange(2 * num_words, dtype=np.int32)
        bits = (read(start + i) << np.uint32(width * i) for i in range(16))
        found = functools.reduce(operator.or_, bits)
        return apart(found if width == 2 else found[:, 0::2] | (found[:, 1::2] << 16))

    return steps, by_device(cpu=as_loop, gpu=unrolled)


def march_rays(
    rays: Rays, grid: OccupancyGrid, jitter: jax.Array, field: Field | None = None, *, config: MarchConfig
) -> Samples:
    """The samples of R rays in occupied cells that no opaque ones hide, packed into a buffer of config.num_samples.

    field: where config.num_candidates is set, that whose density then says which of so many steps are samples.
    One jitter a ray keeps its steps a fixed distance apart, so that their intervals tile the way through the box.
    Devices that share a program each march through their part of the rays, and then take equal parts of the samples.
    """
    own_rays, own_jitter = own_share((rays, jitter))
    candidates = all_shares(find_visible(own_rays, grid, own_jitter, config=config))
    if not config.num_candidates or field is None:
        return pack_steps(candidates, size=config.num_samples, num_parts=num_shares())
    looked_at = pack_steps(candidates, size=config.num_candidates, num_parts=num_shares())
    # The last 8 of the 24 bits of a jitter: where in its step a sample lies says nothing about them.
    offset = (jitter[0] * 2**24).astype(jnp.int32) % ROULETTE_UNITS
    return draw_samples(looked_at, rays, field, offset, config=config)


def pack_steps(candidates: Candidates, *, size: int, num_parts: int = 1) -> Samples:
    """The steps of R rays as samples, one after the other in a buffer of `size`.

    Rays are taken in order while all of their samples fit; the samples of the others are counted as dropped. num_parts:
    of devices that share a program, which take the same rays as one alone would, each those whose samples begin in its
    part of the buffer. What a share holds is counted there and nowhere else.
    """
    num_rays, num_words = candidates.words.shape
    ends = count_bits(candidates.words)
    counts = ends[:, -1]
    end = jnp.cumsum(counts, dtype=jnp.int32)
    own, slots = _own_slots(counts, end, end <= size, size=size, longest=32 * num_words, num_parts=num_parts)
    place = jnp.maximum(end - slots.first, 0) if num_parts > 1 else end
    ended = jnp.zeros(slots.size, jnp.int32).at[place].add(1, mode="drop", indices_are_sorted=True)
    ray = jnp.minimum(jnp.cumsum(ended, dtype=jnp.int32), num_rays - 1)
    step = nth_bit_of_row(candidates.words, ends, ray, slots.number - (end - counts)[ray])
    steps = candidates.steps[ray]
    return slots.samples(steps.t_at(step), steps.dt_at(step), ray, own, dropped=end[-1] - slots.num_kept)


@dataclass(frozen=True)
class _Slots:
    """Those of a buffer of samples that a device has: from `first` to before `last`, of `num_kept` that are filled."""

    first: int | jax.Array
    last: jax.Array
    num_kept: jax.Array
    size: int  # of the device's own buffer

    @property
    def number(self) -> jax.Array:
        """The slots in the device's own buffer (N,) i32, counted in the whole one."""
        return jnp.arange(self.size, dtype=jnp.int32) + self.first

    def samples(self, t: jax.Array, dt: jax.Array, ray: jax.Array, own: jax.Array, *, dropped: jax.Array) -> Samples:
        """Samples in those slots; dropped: of all devices together, which the first one counts."""
        valid = self.number < self.last
        return Samples(
            t=t,
            dt=jnp.where(valid, dt, 0),
            ray=ray,
            valid=valid,
            ray_complete=own,
            num_samples=self.last - self.first,
            num_dropped=dropped if num_shares() == 1 else jnp.where(share_index() == 0, dropped, 0),
        )


def _own_slots(
    counts: jax.Array, end: jax.Array, complete: jax.Array, *, size: int, longest: int, num_parts: int
) -> tuple[jax.Array, _Slots]:
    """Which complete rays (R,) are this device's, and its slots of a buffer of `size`.

    counts (R,): the samples of each ray, at most `longest`; end (R,): where they end in the buffer.
    """
    num_kept = jnp.max(jnp.where(complete, end, 0))
    if num_parts == 1:
        return complete, _Slots(0, num_kept, num_kept, size)
    part, begin = -(-size // num_parts), end - counts
    own = complete & (jnp.minimum(begin // part, num_parts - 1) == share_index())
    bounds = [(share_index() + i) * part for i in range(2)]
    first, last = (jnp.minimum(jnp.min(begin, where=begin >= bound, initial=size), num_kept) for bound in bounds)
    return own, _Slots(first, last, num_kept, part + longest)  # its last ray may reach into the next part


ROULETTE_UNITS = 256
"""In which probabilities are counted: sums of them over all steps that are looked at fit an i32."""


def draw_samples(looked_at: Samples, rays: Rays, field: Field, offset: jax.Array, *, config: MarchConfig) -> Samples:
    """Of steps that are looked at those that matter to the colours of R rays, by the density of a field.

    A step that less light than min_transmittance reaches is no sample. One whose weight w is below config.roulette, and
    so with little gradient, is one with probability w / roulette, and then as many times as long: a Russian roulette,
    under which sums over the steps of a ray keep their mean. It is played systematically: probabilities are added up
    along the rays, and a step is a sample where their sum passes a whole number, so that a haze of faint steps has as
    many samples as it has probability, to one more or less. offset () i32 in [0, ROULETTE_UNITS): where the sum starts.

    Nowhere else must the field be evaluated in full and differentiated. Rays are taken in order while their samples fit
    into a buffer of config.num_samples; those whose steps were not all looked at have none.
    """
    num_rays, num_parts = len(looked_at.ray_complete), num_shares()
    units = _roulette_units(*lax.stop_gradient((looked_at, rays, field)), config=config)
    total = jnp.cumsum(units, dtype=jnp.int32)
    total = total + offset + jnp.sum(jnp.where(np.arange(num_parts) < share_index(), all_shares(total[-1:]), 0))
    number = total // ROULETTE_UNITS  # of samples up to a step, itself included
    drawn = number > (total - units) // ROULETTE_UNITS
    counts = jnp.zeros(num_rays, jnp.int32).at[looked_at.ray].add(drawn.astype(jnp.int32), indices_are_sorted=True)
    counts, complete = over_shares(counts), any_share(looked_at.ray_complete)
    end = jnp.cumsum(counts, dtype=jnp.int32)
    size, longest = config.num_samples, config.num_steps
    own, slots = _own_slots(counts, end, complete & (end <= size), size=size, longest=longest, num_parts=num_parts)

    longer = looked_at.dt * (ROULETTE_UNITS / jnp.maximum(units, 1).astype(jnp.float32))
    place = jnp.where(drawn, number - 1, size)
    t, dt, ray, place = all_shares((looked_at.t, longer, looked_at.ray, place))
    source = jnp.zeros(size, jnp.int32).at[place].set(jnp.arange(len(place), dtype=jnp.int32), mode="drop")
    source = source[jnp.minimum(slots.number, size - 1)]
    # Rays stay sorted in the unused end.
    ray = jnp.where(slots.number < slots.last, ray[source], num_rays - 1)
    dropped = over_shares(looked_at.num_dropped) + end[-1] - slots.num_kept
    return slots.samples(t[source], dt[source], ray, own, dropped=dropped)


def _roulette_units(looked_at: Samples, rays: Rays, field: Field, *, config: MarchConfig) -> jax.Array:
    """The probabilities with which steps (N,) are samples, (N,) i32 of ROULETTE_UNITS, none of them 0 but where no
    light reaches a step.
    """
    direction = rays.direction[looked_at.ray]
    density, _ = field(rays.origin[looked_at.ray] + looked_at.t[:, None] * direction, direction)
    thickness = density * looked_at.dt
    depth = optical_depth_before(thickness, looked_at.ray, len(looked_at.ray_complete))
    reached = looked_at.valid & (depth < -math.log(max(config.min_transmittance, math.exp(-OPAQUE))))
    if not config.roulette:
        return jnp.where(reached, ROULETTE_UNITS, 0)
    weight = jnp.exp(-depth) * -jnp.expm1(-thickness)
    units = jnp.clip(jnp.ceil(weight * (ROULETTE_UNITS / config.roulette)), 1, ROULETTE_UNITS).astype(jnp.int32)
    # A NaN too makes a sample, so that the loss shows it.
    return jnp.where(reached, jnp.where(weight < config.roulette, units, ROULETTE_UNITS), 0)


def stratified_samples(num_rays: int, jitter: jax.Array, *, config: StratifiedConfig) -> Samples:
    """One sample per bin and ray, as the 100-line reference takes them. jitter (R, num_bins) in [0, 1).

    Bins are bounded by the midpoints between evenly spaced points from near to far; dt reaches to the next sample.
    Devices that share a program each take the samples of their part of the rays.
    """
    ray, jitter = own_share((jnp.arange(num_rays, dtype=jnp.int32), jitter))
    edges = jnp.linspace(config.near, config.far, config.num_bins, dtype=jnp.float32)
    middles = (edges[1:] + edges[:-1]) / 2
    lower, upper = jnp.concatenate([edges[:1], middles]), jnp.concatenate([middles, edges[-1:]])
    t = lower + (upper - lower) * jitter
    dt = jnp.concatenate([jnp.diff(t, axis=1), jnp.full((len(t), 1), config.last_interval, t.dtype)], axis=1)
    return Samples(
        t=t.reshape(-1),
        dt=dt.reshape(-1),
        ray=jnp.repeat(ray, config.num_bins),
        valid=jnp.ones(t.size, bool),
        ray_complete=jnp.zeros(num_rays, bool).at[ray].set(True),
        num_samples=jnp.int32(t.size),
        num_dropped=jnp.int32(0),
    )


def jitter_shape(num_rays: int, *, sampler: MarchConfig | StratifiedConfig) -> tuple[int, ...]:
    """The shape of the uniform noise that `sample_rays` takes."""
    return (num_rays,) if isinstance(sampler, MarchConfig) else (num_rays, sampler.num_bins)


def sample_rays(
    rays: Rays,
    grid: OccupancyGrid | None,
    jitter: jax.Array,
    field: Field | None = None,
    *,
    sampler: MarchConfig | StratifiedConfig,
) -> Samples:
    """Samples of R rays as `sampler` says; only marching needs the grid, and the field: see `march_rays`."""
    if isinstance(sampler, StratifiedConfig):
        return stratified_samples(rays.origin.shape[0], jitter, config=sampler)
    if grid is None:
        raise ValueError("grid = None: marching needs an OccupancyGrid")
    return march_rays(rays, grid, jitter, field, config=sampler)
