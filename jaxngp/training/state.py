"""All that a training run is at one moment."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxngp.config import MarchConfig, NerfConfig, RunConfig
from jaxngp.fields import Params, init_params
from jaxngp.occupancy import OccupancyGrid, init_occupancy
from jaxngp.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """Arrays only: exactly what a checkpoint holds. The key never changes; a step uses fold_in(key, step)."""

    step: jax.Array  # () i32
    params: Params
    ema_params: Params  # the average of params that is evaluated; empty where optimizer.ema_decay is 0
    opt_state: optax.OptState
    occupancy: OccupancyGrid | None  # None where no rays march
    key: jax.Array  # () typed PRNG key

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and render with."""
        return self.ema_params or self.params


def init_state(seed: int, *, config: RunConfig) -> TrainState:
    """A fresh state; every cell of its occupancy grid is occupied. Equal seeds give equal states.

    Takes a seed, not a key: training donates the state's buffers, and would delete a key that the caller holds.
    """
    return _init_state(np.uint32(seed), config=config)


@functools.partial(jax.jit, static_argnames="config")  # a dozen small programs otherwise
def _init_state(seed: np.uint32, *, config: RunConfig) -> TrainState:
    key = jax.random.key(seed)
    params = init_params(jax.random.fold_in(key, 2**31), config=config.field)
    occupancy = None
    if isinstance(config, NerfConfig) and isinstance(config.sampler, MarchConfig):
        occupancy = init_occupancy(jnp.ones(config.sampler.occupancy.resolution**3, bool))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=params if config.optimizer.ema_decay else {},
        opt_state=make_optimizer(config.optimizer).init(params),
        occupancy=occupancy,
        key=key,
    )
