"""A wall that XLA's fusion does not cross on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def walled(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), kept out of the fusions of whatever consumes it; its first argument is an array of floats.

    XLA:CPU fuses producers into gathers and scatters and then computes them again for every element that is read:
    sample positions, for one, once per level and corner. An optimization barrier does not stop it; a conditional on
    a run-time predicate does. The predicate here compares the first number of the first argument with one NaN
    among 2^24, of a payload that no arithmetic yields, so the other branch is never taken. On accelerators, where
    a conditional would wait for the host and fusing is right, this is a plain call.
    """
    first = jax.tree.leaves(args)[0]
    if first.size == 0:
        return function(*args)
    function = jax.jit(function, inline=True)  # so that the two branches and eval_shape trace it once

    def conditional(*args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        bits = lax.bitcast_convert_type(first.ravel()[0].astype(jnp.float32), jnp.uint32)
        unreachable = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # noqa: E731
        return lax.cond(bits != np.uint32(0xFFF5A5A5), function, unreachable, *args)

    return lax.platform_dependent(*args, cpu=conditional, default=function)
