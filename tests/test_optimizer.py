"""The optimizer: Adam step by step in numpy, and the learning rates of the paper."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays32, floats32

from jaxngp.config import CosineDecay, OptimizerConfig, StepDecay
from jaxngp.training.optimizer import learning_rate, make_optimizer

SHAPES = {
    "encoding": {"table": (4, 2)},
    "density_mlp": {"Dense_0": {"kernel": (2, 3), "bias": (3,)}},
    "colour_mlp": {"Dense_0": {"kernel": (3, 1)}},
}
trees = st.fixed_dictionaries(
    {
        "encoding": st.fixed_dictionaries({"table": arrays32((4, 2), -1, 1)}),
        "density_mlp": st.fixed_dictionaries(
            {"Dense_0": st.fixed_dictionaries({"kernel": arrays32((2, 3), -1, 1), "bias": arrays32(3, -1, 1)})}
        ),
        "colour_mlp": st.fixed_dictionaries({"Dense_0": st.fixed_dictionaries({"kernel": arrays32((3, 1), -1, 1)})}),
    }
)


@functools.cache
def jitted_update(config: OptimizerConfig) -> Any:
    return jax.jit(make_optimizer(config).update)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@given(trees, st.lists(trees, min_size=3, max_size=3))
def test_a_step_is_adam_with_decay_off_the_table(weight_decay: float, params: dict, gradients: list[dict]) -> None:
    """Adam, with weight decay in the gradient of all but the hash table."""
    config = OptimizerConfig(weight_decay=weight_decay)
    optimizer = make_optimizer(config)
    state, update = optimizer.init(params), jitted_update(config)
    m, v = (jax.tree.map(lambda a: np.zeros(a.shape), params) for _ in range(2))
    for step, gradient in enumerate(gradients, start=1):
        updates, state = update(gradient, state, params)
        decayed = jax.tree.map_with_path(
            lambda path, g, p: g.astype(np.float64) + (weight_decay * p if path[0].key != "encoding" else 0),
            gradient,
            params,
        )
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, decayed)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, v, decayed)
        for name in SHAPES:
            for found, first, second in zip(*(jax.tree.leaves(t[name]) for t in (updates, m, v)), strict=True):
                expected = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-15)
                sure = (np.sqrt(second) > 1e-6) | (second == 0)  # below, float32 loses the squares
                np.testing.assert_allclose(np.asarray(found)[sure], expected[sure], rtol=2e-4, atol=1e-5)
        params = jax.tree.map(lambda p, u: p - 0.01 * np.asarray(u), params, updates)


def test_a_table_entry_without_gradient_stays() -> None:
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1))
    params = jax.tree.map(lambda s: jnp.ones(s), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["encoding"]["table"], 0)
    for name in ("density_mlp", "colour_mlp"):
        for update in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(update, 1, rtol=1e-5)


def test_the_rate_falls_in_thirds_at_its_milestones() -> None:
    """To 0.33 of itself at 20k, 30k and 40k of 50k steps."""
    step = np.array([0, 19_999, 20_000, 29_999, 30_000, 39_999, 40_000, 49_999])
    rates = learning_rate(step, step / 50_000, config=OptimizerConfig())
    expected = 1e-2 * 0.33 ** np.array([0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates.dtype == np.float32


@given(st.integers(0, 49_999))
def test_the_rate_follows_the_fraction_of_the_budget(step: int) -> None:
    """And not the step."""
    number, fraction = np.array([step]), np.array([step / 50_000])
    rate = learning_rate(number, fraction, config=OptimizerConfig())
    assert rate == learning_rate(np.zeros(1), fraction, config=OptimizerConfig())
    assert rate == np.float32(1e-2 * 0.33 ** max((step - 10_000) // 10_000, 0))


def test_warmup_rises_in_equal_parts_to_the_full_rate() -> None:
    config = OptimizerConfig(warmup_steps=4, learning_rate=0.5)
    rates = learning_rate(np.arange(7), np.zeros(7), config=config)
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5], rtol=1e-6)


@given(floats32(0, 1), st.integers(0, 10**6))
def test_the_rate_is_positive_and_never_above_its_peak(fraction: float, step: int) -> None:
    for config in (OptimizerConfig(), OptimizerConfig(warmup_steps=100, decay=StepDecay(factor=0.5, start=0.0))):
        rate = learning_rate(np.array([step]), np.array([fraction]), config=config)
        assert 0 < rate <= np.float32(config.learning_rate)


def test_a_factor_of_one_keeps_the_rate() -> None:
    rates = learning_rate(np.arange(100), np.linspace(0, 1, 100), config=OptimizerConfig(decay=StepDecay(factor=1.0)))
    np.testing.assert_array_equal(rates, np.float32(1e-2))


def test_a_cosine_falls_to_its_final_share() -> None:
    config = OptimizerConfig(decay=CosineDecay(start=0.2, final=0.1))
    rates = learning_rate(np.zeros(5), np.array([0, 0.2, 0.6, 0.8, 1.0]), config=config)
    share = 0.5 * (1 + np.cos(np.pi * np.array([0, 0, 0.5, 0.75, 1.0])))
    np.testing.assert_allclose(rates, 1e-2 * (0.1 + 0.9 * share), rtol=1e-6)
