"""Bits against numpy: packing, rank, select, cutting off, interleaving."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxngp import bitsets

ROWS = 16
word = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
words = hnp.arrays(np.uint32, 8, elements=word)

pack_bits = jax.jit(bitsets.pack_bits)
count_bits = jax.jit(bitsets.count_bits)
nth_set_bit = jax.jit(bitsets.nth_set_bit)
nth_bit = jax.jit(bitsets.nth_bit)
nth_bit_of_row = jax.jit(bitsets.nth_bit_of_row)
until_nth = jax.jit(bitsets.until_nth, static_argnames="n")
interleave = jax.jit(bitsets.interleave)
even_bits = jax.jit(bitsets.even_bits)


def unpack(packed: np.ndarray) -> np.ndarray:
    """(..., n) u32 -> (..., 32 n) bool, the lowest bit first."""
    packed = np.ascontiguousarray(packed, "<u4")
    return np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little").astype(bool)


@given(words)
def test_packing_puts_the_first_flag_lowest(packed: np.ndarray) -> None:
    found = pack_bits(unpack(packed))
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, packed)
    np.testing.assert_array_equal(pack_bits(unpack(packed).reshape(2, 128)), packed.reshape(2, 4))


@given(st.integers(1, 2**32 - 1) | st.sampled_from([2**k for k in range(32)]))
def test_the_nth_set_bit_of_a_word(value: int) -> None:
    places = np.flatnonzero(unpack(np.array([value], np.uint32)))
    ranks = np.minimum(np.arange(32), len(places) - 1)
    found = nth_set_bit(jnp.full(32, value, jnp.uint32), jnp.asarray(ranks))
    np.testing.assert_array_equal(found, places[ranks])


@given(words)
def test_bits_are_counted_up_to_each_word(packed: np.ndarray) -> None:
    expected = unpack(packed).reshape(8, 32).sum(axis=1)
    end = count_bits(packed)
    assert end.dtype == jnp.int32
    np.testing.assert_array_equal(end, np.cumsum(expected))
    np.testing.assert_array_equal(count_bits(packed.reshape(2, 4)), np.cumsum(expected.reshape(2, 4), axis=1))


@given(words)
def test_bits_by_rank_are_the_set_ones_in_order(packed: np.ndarray) -> None:
    numbers = np.flatnonzero(unpack(packed))
    found = nth_bit(packed, count_bits(packed), np.arange(256, dtype=np.int32))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[: len(numbers)], numbers)
    assert ((np.asarray(found) >= 0) & (np.asarray(found) < 256)).all()  # a valid number, whatever the rank


@pytest.mark.parametrize("num_words", [1, 2, 5, 8, 32])
@settings(max_examples=20)
@given(data=st.data())
def test_bits_of_a_row_by_rank(num_words: int, data: st.DataObject) -> None:
    """The n-th set one, and some valid number where there is no n-th."""
    packed = data.draw(hnp.arrays(np.uint32, (3, num_words), elements=word | st.just(0)))
    flags = unpack(packed)
    row, n = (a.reshape(-1) for a in np.meshgrid(np.arange(3), np.arange(32 * num_words), indexing="ij"))
    found = np.asarray(nth_bit_of_row(packed, count_bits(packed), row.astype(np.int32), n.astype(np.int32)))
    assert ((found >= 0) & (found < 32 * num_words)).all()
    for i in range(3):
        numbers = np.flatnonzero(flags[i])
        np.testing.assert_array_equal(found[row == i][: len(numbers)], numbers)


@pytest.mark.parametrize("n", [1, 4, 33])
@given(hnp.arrays(np.uint32, (ROWS, 2), elements=word))
def test_bits_until_the_nth_are_all_up_to_it(n: int, packed: np.ndarray) -> None:
    """With the n-th itself."""
    flags = unpack(packed)
    before = np.cumsum(flags, axis=1) - flags
    np.testing.assert_array_equal(unpack(until_nth(packed, n)), before < n)


@given(words)
def test_even_bits_move_into_the_lower_half(packed: np.ndarray) -> None:
    flags = unpack(packed).reshape(8, 32)
    expected = np.concatenate([flags[:, ::2], np.zeros((8, 16), bool)], axis=1)
    np.testing.assert_array_equal(unpack(even_bits(packed)).reshape(8, 32), expected)


@given(words, words)
def test_interleaved_sets_come_apart_again(even: np.ndarray, odd: np.ndarray) -> None:
    pairs = interleave(even, odd)
    np.testing.assert_array_equal(unpack(pairs), np.stack([unpack(even), unpack(odd)], axis=1).reshape(-1))
    for shift, packed in enumerate((even, odd)):
        apart = np.asarray(even_bits(pairs >> shift)).reshape(8, 2)
        np.testing.assert_array_equal(apart[:, 0] | (apart[:, 1] << 16), packed)
    rows = interleave(even.reshape(2, 4), odd.reshape(2, 4))
    np.testing.assert_array_equal(rows, np.asarray(pairs).reshape(2, 8))
