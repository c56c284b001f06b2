"""Several scenes trained by one program: the steps of `nerf` under `jax.vmap`, divided between devices.

The scenes share what shapes the program: the config but for its data and seeds, and the shapes of the views. Each
trains as it would alone, up to rounding, with its own random numbers. What fails in one, such as a loss that becomes
non-finite, leaves the others alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxngp.cameras import PosedImages
from jaxngp.config import InputError, NerfConfig, program_config
from jaxngp.device import compiler_options, default_placement
from jaxngp.training import nerf
from jaxngp.training.loop import MAX_SKIPPED, Progress, init_state, learning_rates
from jaxngp.training.nerf import NerfMetrics
from jaxngp.training.state import TrainState
from jaxngp.training.step import step_options


@dataclass(frozen=True)
class ManyProgress:
    """Where B scenes stand; `of` gives the `Progress` of one. The next iteration donates the buffers of `state`."""

    configs: tuple[NerfConfig, ...]
    state: TrainState  # (B, ...)
    metrics: NerfMetrics | None  # (B,), as of `Progress`
    step: int
    seconds: float  # for all of them
    compile_seconds: float
    num_samples: np.ndarray  # (B,)
    failed: np.ndarray  # (B,) bool: scenes that no camera sees, or whose last MAX_SKIPPED updates were all skipped

    @property
    def finished(self) -> bool:
        return self.step >= self.configs[0].train.max_steps

    def of(self, index: int) -> Progress:
        """Of one scene; `seconds` is its share of the time."""
        pick = functools.partial(jax.tree.map, lambda array: array[index])
        return Progress(
            config=self.configs[index],
            state=pick(self.state),
            metrics=None if self.metrics is None else pick(self.metrics),
            step=self.step,
            seconds=self.seconds / len(self.configs),
            compile_seconds=self.compile_seconds / len(self.configs),
            num_samples=float(self.num_samples[index]),
        )


def group_key(config: NerfConfig, images: Any) -> Any:
    """Scenes with equal keys can be trained together; None where a scene has to be trained alone."""
    if not isinstance(images, PosedImages) or config.train.max_seconds or config.refine.any:
        return None
    leaves, structure = jax.tree.flatten(images)
    budget = (config.train.max_steps, config.train.log_every, nerf_refresh_every(config))
    return program_config(config), budget, structure, tuple((leaf.shape, leaf.dtype.str) for leaf in leaves)


def nerf_refresh_every(config: NerfConfig) -> int:
    """Steps between refreshes of the occupancy grid, 0 without one."""
    return getattr(getattr(config.sampler, "occupancy", None), "refresh_every", 0)


def train_many(
    configs: Sequence[NerfConfig], images: Sequence[PosedImages], *, resume: Sequence[Progress] = ()
) -> Iterator[ManyProgress]:
    """Train B scenes from scratch, or from where `resume` stands, until train.max_steps; as `train` does one.

    Raises InputError where they cannot be trained together: see `group_key`. resume: all at one step.
    """
    keys = [group_key(config, views) for config, views in zip(configs, images, strict=True)]
    if keys[0] is None or any(key != keys[0] for key in keys):
        raise InputError(
            "the scenes cannot be trained together: they need views of equal shapes, configs that differ in data, "
            "seeds and learning rates alone, a budget in steps (set train.max_seconds = 0), and cameras as they are"
        )
    scenes = _Scenes(len(configs))
    static, train = program_config(configs[0]), configs[0].train
    start = resume[0].step if resume else 0
    started = time.perf_counter()
    data = scenes.stack(images)
    grid, pixels = scenes.program(nerf.hull_of_views, compiler_options(), config=static)(data)
    states = [one.state for one in resume] or [init_state(config.train.seed, config=config) for config in configs]
    state = scenes.stack(states)
    failed = np.zeros(len(configs), bool)
    if grid is not None:
        failed = ~np.any(np.asarray(grid.occupied), axis=(1, 2))[: len(configs)]
        state = state if resume else replace(state, occupancy=grid)
    steps = scenes.program(nerf.nerf_steps, step_options(configs[0]), donate=True, config=static)
    refresh = scenes.program(nerf.refresh_occupancy, compiler_options(), donate=True, config=static)
    every, skipped = nerf_refresh_every(configs[0]), np.zeros(len(configs))
    before = [np.array([getattr(one, name) for one in resume] or 0.0) for name in ("seconds", "num_samples")]
    progress = ManyProgress(
        tuple(configs),
        state,
        None,
        start,
        float(before[0].sum()),
        time.perf_counter() - started,
        before[1] + np.zeros(len(configs)),
        failed,
    )
    yield scenes.cut(progress)
    while not progress.finished:
        started = time.perf_counter()
        number = min(train.steps_per_dispatch, train.max_steps - progress.step)
        rates = scenes.stack([learning_rates(progress.step, 0.0, train.steps_per_dispatch, c) for c in configs])
        state, metrics = steps(progress.state, data, pixels, rates, scenes.stack([np.int32(number)] * len(configs)))
        if every and (progress.step + number) // every > progress.step // every:
            state = refresh(state)
        metrics = jax.tree.map(lambda array: np.asarray(array)[: len(configs)], metrics)
        jax.block_until_ready(state)
        skipped = np.where(metrics.skipped == 1, skipped + number, 0)
        progress = replace(
            progress,
            state=state,
            metrics=metrics,
            step=progress.step + number,
            seconds=progress.seconds + time.perf_counter() - started,
            num_samples=progress.num_samples + number * metrics.samples,
            failed=progress.failed | (skipped >= MAX_SKIPPED),
        )
        yield scenes.cut(progress)


class _Scenes:
    """B scenes on the devices of `default_placement`, filled up with copies of the last to a multiple of these."""

    def __init__(self, count: int) -> None:
        place = default_placement()
        devices = np.array([next(iter(place.sharding.device_set))]) if place.mesh is None else place.mesh.devices
        self._count, self._filled = count, -(-count // devices.size) * devices.size
        self._mesh = jax.sharding.Mesh(devices.reshape(-1), ("scenes",))
        self._spec = jax.sharding.PartitionSpec("scenes")

    def stack(self, trees: Sequence[Any]) -> Any:
        """One tree of arrays (B, ...), each device with its scenes."""
        filled = [*trees, *[trees[-1]] * (self._filled - self._count)]
        sharding = jax.sharding.NamedSharding(self._mesh, self._spec)
        return jax.tree.map(lambda *leaves: jax.device_put(_stacked(leaves), sharding), *filled)

    def program(self, function: Callable[..., Any], options: Any, *, donate: bool = False, **static: Any) -> Any:
        """The function under vmap, on every device for its scenes; they exchange nothing."""
        batched = jax.vmap(functools.partial(function, **static))
        shared = jax.shard_map(batched, mesh=self._mesh, in_specs=self._spec, out_specs=self._spec, check_vma=False)
        return jax.jit(shared, donate_argnums=(0,) if donate else (), compiler_options=options)

    def cut(self, progress: ManyProgress) -> ManyProgress:
        """Without the copies that fill up."""
        if self._filled == self._count:
            return progress
        return replace(progress, state=jax.tree.map(lambda array: array[: self._count], progress.state))


def _stacked(leaves: Sequence[Any]) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)
