"""Sets as bits of 32-bit words: bit i % 32 of word i // 32 says whether i is in the set.

Pack, count (rank), find by rank (select), cut off and interleave. A byte per flag would take eight times the memory,
and what is read at random must stay in a cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def pack_bits(flags: jax.Array) -> jax.Array:
    """(..., 32 n) bool -> (..., n) u32, the first flag in the lowest bit."""
    words = flags.reshape(*flags.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(words << np.arange(32, dtype=np.uint32), axis=-1, dtype=jnp.uint32)


def count_bits(words: jax.Array) -> jax.Array:
    """(..., n) u32 -> (..., n) i32: the number of bits that are set in each word of a row and all before it."""
    return jnp.cumsum(lax.population_count(words).astype(jnp.int32), axis=-1, dtype=jnp.int32)


def nth_set_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """The place (0 to 31) of the n-th set bit, counted from 0, of a u32 word that has more than n of them."""
    place = jnp.zeros_like(word)
    n = n.astype(jnp.uint32)
    for width in (16, 8, 4, 2, 1):
        below = lax.population_count(word & np.uint32((1 << width) - 1))
        above = n >= below
        n = jnp.where(above, n - below, n)
        place = place + jnp.where(above, np.uint32(width), np.uint32(0))
        word = jnp.where(above, word >> width, word)
    return place


def nth_bit(words: jax.Array, end: jax.Array, choice: jax.Array) -> jax.Array:
    """The numbers of the set bits of given ranks. choice (M,) i32 in [0, number of set bits) -> (M,) i32.

    words (n,) u32 and end = count_bits(words). With no bit set there is nothing to choose; the result is then a valid
    number that means nothing.
    """
    found = jnp.searchsorted(end, choice, side="right", method="scan_unrolled")
    word = jnp.minimum(found, words.shape[0] - 1).astype(jnp.int32)
    count = lax.population_count(words[word]).astype(jnp.int32)
    place = nth_set_bit(words[word], jnp.clip(choice - (end[word] - count), 0, 31))
    return jnp.clip(word * 32 + place.astype(jnp.int32), 0, words.shape[0] * 32 - 1)


def nth_bit_of_row(words: jax.Array, end: jax.Array, row: jax.Array, n: jax.Array) -> jax.Array:
    """The number of the n-th bit (counted from 0) that is set in a row; some valid number where it has no n-th.

    words (R, W) u32 and end = count_bits(words), row (N,) i32, n (N,) i32 -> (N,) i32.
    """
    num_words = words.shape[1]
    word = jnp.zeros_like(row)
    for width in (1 << b for b in reversed(range((num_words - 1).bit_length()))):
        # The words before `word + width` hold no more than n set bits: go on behind them.
        middle = jnp.minimum(word + width, num_words - 1)
        word = jnp.where(end[row, middle - 1] <= n, middle, word)
    before = jnp.where(word > 0, end[row, word - 1], 0)
    return word * 32 + nth_set_bit(words[row, word], jnp.clip(n - before, 0, 31)).astype(jnp.int32)


def until_nth(words: jax.Array, n: int | jax.Array) -> jax.Array:
    """All bits up to the n-th (counted from 1) that is set in each row of words (R, W), or all if there is none.

    n: a number for all rows, or (R, 1) i32; up to the 0-th there is no bit.
    """
    count, end = lax.population_count(words).astype(jnp.int32), count_bits(words)
    place = nth_set_bit(words, jnp.clip(n - 1 - (end - count), 0, 31))
    ending = (np.uint32(2) << place) - 1
    return jnp.where(end < n, np.uint32(0xFFFFFFFF), jnp.where(end - count < n, ending, np.uint32(0)))


def interleave(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Two sets (..., n) u32 as one of pairs, (..., 2 n) u32: bit i of the first in place 2 i, of the second in 2 i + 1.

    `even_bits` takes them apart again.
    """
    halves = jnp.stack([words >> shift & 0xFFFF for shift in (0, 16) for words in (even, odd)], axis=-1)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        halves = (halves | (halves << shift)) & np.uint32(mask)
    return (halves[..., 0::2] | (halves[..., 1::2] << 1)).reshape(*even.shape[:-1], -1)


def even_bits(words: jax.Array) -> jax.Array:
    """The 16 bits at even places of u32 words (...), moved together into the lower half."""
    words = words & np.uint32(0x55555555)
    for shift, mask in ((1, 0x33333333), (2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        words = (words | (words >> shift)) & np.uint32(mask)
    return words
