"""Adam with the paper's constants, its learning rate as a function of how much of the budget is spent."""

from __future__ import annotations

import jax
import numpy as np
import optax

from jaxngp.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam at learning rate 1 (paper section 4): `apply_gradient` scales its updates.

    L2 on the MLP weights is added to the gradient before Adam, as tiny-cuda-nn does; the hash table gets none, for
    pulling rarely visited entries to zero costs quality.
    """
    return optax.chain(
        optax.masked(optax.add_decayed_weights(config.weight_decay), _is_mlp_weight),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    )


def _is_mlp_weight(params: optax.Params) -> optax.Params:
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "table", params)


def learning_rate(step: np.ndarray, progress: np.ndarray, *, config: OptimizerConfig) -> np.ndarray:
    """The learning rate of steps (K,) at which fractions (K,) in [0, 1] of the training budget are spent. f32.

    The paper's x 0.33 at 20k and every 10k of 50k steps is decay_start = 0.4 and decay_interval = 0.2: given as
    fractions, it fits a budget of seconds and a short run as well.
    """
    decays = np.maximum(np.floor((progress - config.decay_start) / config.decay_interval) + 1, 0)
    warmup = np.minimum((step + 1) / max(config.warmup_steps, 1), 1)
    return (config.learning_rate * warmup * config.decay_factor**decays).astype(np.float32)
