"""The complete state of a training run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxngp.config import RunConfig
from jaxngp.fields import Params, init_params
from jaxngp.occupancy import OccupancyGrid
from jaxngp.refinement import Refinement
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
    refinement: Refinement | None = None  # of the cameras; None where they stay as given

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and render with."""
        return self.ema_params or self.params


def fresh_state(key: jax.Array, *, config: RunConfig) -> TrainState:
    """The state before step 0 of any task, without an occupancy grid."""
    params = init_params(jax.random.fold_in(key, 2**31), config=config.field)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=params if config.optimizer.ema_decay else {},
        opt_state=make_optimizer(config.optimizer).init(params),
        occupancy=None,
        key=key,
    )
