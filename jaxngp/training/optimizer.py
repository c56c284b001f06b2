"""Adam with the paper's constants, its learning rate as a function of how much of the budget is spent."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from jaxngp.config import CosineDecay, OptimizerConfig, StepDecay


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam at learning rate 1 (paper section 4): `step.apply_gradient` scales its updates.

    L2 on the MLP weights is added to the gradient before Adam, as tiny-cuda-nn does; the hash table gets none, for
    pulling rarely visited entries to zero costs quality.
    """
    return optax.chain(
        optax.masked(optax.add_decayed_weights(config.weight_decay), _is_mlp_weight),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    )


def _is_mlp_weight(params: optax.Params) -> optax.Params:
    return jax.tree.map_with_path(lambda path, _: not is_table(path), params)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether a path in a tree like the parameters leads to a hash table."""
    return bool(path) and getattr(path[-1], "key", "") == "table"


def learning_rate(step: np.ndarray, fraction: np.ndarray, *, config: OptimizerConfig) -> np.ndarray:
    """The learning rate of steps (K,) at which fractions (K,) in [0, 1] of the training budget are spent. f32.

    Decay is a matter of the fraction, not of the step, so that it fits a short run and a budget of seconds as well.
    """
    warmup = np.minimum((step + 1) / max(config.warmup_steps, 1), 1)
    return (config.learning_rate * warmup * _decay(fraction, config.decay)).astype(np.float32)


def _decay(fraction: np.ndarray, decay: StepDecay | CosineDecay) -> np.ndarray:
    """What the learning rate is multiplied by."""
    if isinstance(decay, StepDecay):
        # A little more than the fraction, so that 0.4 + 0.2 counts as reaching 0.6.
        times = np.floor((fraction + 1e-9 - decay.start) / decay.interval) + 1
        return decay.factor ** np.maximum(times, 0)
    phase = np.clip((fraction - decay.start) / (1 - decay.start), 0, 1)
    return decay.final + (1 - decay.final) * 0.5 * (1 + np.cos(np.pi * phase))
