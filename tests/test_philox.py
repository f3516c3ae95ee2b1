"""Dropout's random words: the published function, counted by the call's own indices, the same in every tiling."""

import itertools

import numpy as np
import pytest

from attend_shared import philox

MASK = 0xFFFFFFFF


def plain(counter, key, rounds=7):
    """Philox4x32 in Python integers, as its paper writes it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & MASK, (first >> 32) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def test_published_words():
    seed = philox.split_seed(123456789123)
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((MASK,) * 4, (MASK,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ((5, 17, 3, 2), seed, "b801447a d1795165 1e292a83 ef6d7f96"),
    ):
        assert " ".join(f"{word:08x}" for word in philox.words(counter, key)) == expected


def test_words_at_10_rounds_are_those_of_random123():
    """Its known answers are for 10 rounds: the same function, so that the 7 are known to stop at the right place."""
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        assert " ".join(f"{word:08x}" for word in philox.words(counter, key, rounds=10)) == expected


def test_words_agree_with_integers():
    rng = np.random.default_rng(0)
    counters, keys = rng.integers(0, 2**32, (4, 50), dtype=np.uint32), rng.integers(0, 2**32, (2, 50), dtype=np.uint32)
    words = philox.words(counters, keys)
    assert words.shape == (50, 4) and words.dtype == np.uint32
    for n in range(50):
        expected = plain([int(c) for c in counters[:, n]], [int(k) for k in keys[:, n]])
        assert tuple(int(word) for word in words[n]) == expected


def test_words_broadcast():
    words = philox.words((np.arange(3), np.arange(5)[:, None], 7, 1), (2, 3))
    assert words.shape == (5, 3, 4)
    np.testing.assert_array_equal(words[4, 2], plain((2, 4, 7, 1), (2, 3)))


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_keep_mask_is_its_definition(seed, dropout):
    shape = b, h, i, j = 2, 3, 4, 7
    keep = philox.keep_mask(seed, shape, dropout)
    assert keep.shape == shape and keep.dtype == np.bool_
    for item, head, t, key in itertools.product(range(b), range(h), range(i), range(j)):
        word = plain((key // 4, t, head, item), (seed % 2**32, seed // 2**32))[key % 4]
        assert keep[item, head, t, key] == (word >= int(dropout * 2**32))


def test_every_tile_is_a_part_of_the_whole():
    whole = philox.keep_mask(99, (3, 2, 9, 14), 0.4)
    for start in itertools.product((0, 1), (0, 1), (0, 3), range(9)):
        shape = (2, 1, 5, 5)
        part = whole[tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))]
        np.testing.assert_array_equal(philox.keep_mask(99, shape, 0.4, start=start), part)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1), (1, 1, 2, 6)])
def test_any_size(shape):
    np.testing.assert_array_equal(
        philox.keep_mask(3, shape, 0.5), philox.keep_mask(3, (2, 2, 3, 8), 0.5)[tuple(map(slice, shape))]
    )


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.75, 0.99])
def test_the_share_that_is_dropped(dropout):
    keep = philox.keep_mask(1, (4, 8, 64, 64), dropout)
    deviation = np.sqrt(dropout * (1 - dropout) / keep.size)
    assert abs((1 - keep.mean()) - dropout) < 4 * deviation
    for axis in range(4):  # along every axis, and not only on the whole
        share = 1 - keep.mean(axis=tuple(other for other in range(4) if other != axis))
        assert np.abs(share - dropout).max() < 5 * deviation * np.sqrt(len(share))


def test_neighbours_are_independent():
    x = philox.keep_mask(5, (4, 8, 64, 64), 0.5) - 0.5
    for axis, distance in itertools.product(range(4), (1, 2, 3)):
        shifted = np.take(x, range(distance, x.shape[axis]), axis) * np.take(x, range(x.shape[axis] - distance), axis)
        assert abs(4 * shifted.mean()) < 5 / np.sqrt(shifted.size)


def test_seeds_differ_in_either_half():
    masks = [philox.keep_mask(seed, (1, 2, 16, 16), 0.5) for seed in (0, 1, 2**32, 2**63)]
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < (one == other).mean() < 0.6


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32, 123456789123, 2**64 - 1])
def test_a_seed_in_all_its_forms(seed):
    pair = np.array([seed % 2**32, seed // 2**32], np.uint32)
    np.testing.assert_array_equal(philox.split_seed(seed), pair)
    np.testing.assert_array_equal(philox.split_seed(pair), pair)
    np.testing.assert_array_equal(philox.split_seed(np.uint64(seed)), pair)
    assert philox.split_seed(seed).dtype == np.uint32
    expected = philox.keep_mask(seed, (1, 1, 3, 5), 0.5)
    np.testing.assert_array_equal(philox.keep_mask(pair, (1, 1, 3, 5), 0.5), expected)


@pytest.mark.parametrize(
    ("seed", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        (1.0, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
        (np.zeros(2, np.int64), TypeError),
        (np.zeros(3, np.uint32), TypeError),
    ],
)
def test_what_is_no_seed(seed, error):
    with pytest.raises(error, match=r"^seed: expected"):
        philox.split_seed(seed)


def test_threshold():
    assert philox.keep_mask(0, (1, 1, 8, 8), 0.0).all()
    assert philox.threshold(0.1) == 429496729  # 429496729.6, cut
    assert philox.threshold(np.float32(0.5)) == 2**31
    assert philox.threshold(float(np.nextafter(1, 0))) == 2**32 - 1
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^dropout: expected 0 <= dropout < 1"):
            philox.threshold(dropout)
