"""Golden values: if one of these changes, every run that was ever started with this program changes with it."""

import numpy as np
import pytest

from aquatint.utils.seeds import generator, key_of, seed_of, words_of

MASK = 2**64 - 1


def philox_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 by the book (Salmon et al. 2011), on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def test_the_reference_below_gives_the_published_philox_vector():
    assert philox_block((0, 0, 0, 0), (0, 0)) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("position", [0, 1, 12345, 2**40, 2**64 - 1])
def test_raw_bits_are_philox_of_the_counter_that_holds_the_position(position):
    key = tuple(int(word) for word in key_of(7, "noise"))
    expected = philox_block((1, 0, position, 0), key) + philox_block((2, 0, position, 0), key)
    assert generator(7, "noise", position).bit_generator.random_raw(8).tolist() == expected


def test_golden_key():
    assert key_of(0, "noise").tolist() == [5356080978081994028, 13889679759661800807]


def test_golden_bits():
    assert generator(0, "noise", 0).bit_generator.random_raw(3).tolist() == [
        826562693581231949,
        7400808274817065057,
        11880205231918347771,
    ]
    assert generator(0, "noise", 1).bit_generator.random_raw() == 16099683793508169431
    assert generator(1, "noise", 0).bit_generator.random_raw() == 11982773154323683799


def test_golden_normal_draws():
    drawn = generator(0, "noise", 0).standard_normal(4, dtype=np.float32)
    assert drawn.tolist() == [-1.150606632232666, 0.06007951870560646, 0.24495486915111542, -1.0306931734085083]


def test_golden_uniform_draw_and_permutation():
    assert generator(0, "timestep", 5).random() == 0.10008492511052336
    assert generator(7, "timestep-strata", 3).permutation(8).tolist() == [4, 6, 2, 3, 7, 1, 0, 5]


def test_golden_seeds_for_other_libraries():
    assert seed_of(0, "rounding") == seed_of(0, "rounding", 0) == 2888811648256933325
    assert seed_of(0, "rounding", 1) == 3605326990850799414
    assert seed_of(2**63 - 1, "rounding", 2**40) == 6407203924704668600


def test_golden_words_for_hashes():
    assert words_of(1, "rounding/0/1") == (3032093147, 946207045)
    assert len({words_of(seed, f"rounding/{index}") for seed in range(50) for index in range(50)}) == 2500


def test_seed_stream_and_position_each_change_the_draw():
    keys = [(0, "noise", 0), (1, "noise", 0), (0, "latent", 0), (0, "noise", 1), (1, "0/noise", 0)]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_neighbouring_positions_are_uncorrelated():
    first, second = (generator(0, "noise", position).standard_normal(20_000) for position in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 3 / np.sqrt(20_000)
