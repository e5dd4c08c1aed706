"""Addressed randomness: the values of addresses are pinned, for stores and runs depend on them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cache.codec.rotation import Rotation
from eupe.addressed import MOST_BITS, bits, hashed, shuffled, uniforms


def test_the_bits_of_an_address_never_change():
    assert bits("pipelines.draws/order/3/emoji") == 2149884040449179917
    assert bits("network/3/stage2/7/1", count=56) == 30386830713358218


def test_the_bits_of_a_whole_array_never_change():
    assert hashed(np.array([0, 1, 2**40]), "cache.order/3/1/rows").tolist() == [
        8477694344647590914,
        14107136990978017114,
        10531133145890531548,
    ]


def test_uniform_numbers_never_change():
    assert uniforms('[3,"a/ö",2]', 3) == [
        0.06513232550319392,
        0.19354962266268338,
        0.4840254526900112,
    ]


def test_the_signs_of_a_rotation_never_change():
    signs = np.packbits(Rotation(300).signs > 0).tobytes().hex()
    assert signs == "f687e45404bb783e4a8bf5115e2e73d21150269f9797f770b1b07c9e5ed40d23044eb80533f0"


@given(address=st.text(), count=st.integers(0, MOST_BITS))
def test_fewer_bits_are_the_lowest_of_more(address, count):
    assert bits(address, count) == bits(address, MOST_BITS) % 2**count


@given(numbers=st.lists(st.integers(0, 2**62), max_size=20), place=st.integers(0, 19))
def test_a_draw_depends_on_its_number_alone(numbers, place):
    drawn = hashed(np.array(numbers, np.int64), "somewhere")
    if place < len(numbers):
        assert drawn[place] == hashed(np.array([numbers[place]], np.int64), "somewhere")[0]


@given(count=st.integers(0, 3000), address=st.text())
def test_a_shuffle_is_the_order_of_its_hashes(count, address):
    expected = np.argsort(hashed(np.arange(count), address), kind="stable")
    np.testing.assert_array_equal(shuffled(count, address), expected)


def test_hashes_that_differ_in_their_lowest_bits_alone_are_put_in_order(monkeypatch):
    def alike(numbers, address):
        lowest = numbers.astype(np.uint64) * np.uint64(7919) % np.uint64(1024)
        return (hashed(numbers, address) & np.uint64(7 << 61)) | lowest

    monkeypatch.setattr("eupe.addressed.hashed", alike)
    expected = np.argsort(alike(np.arange(1000), "alike"))
    np.testing.assert_array_equal(shuffled(1000, "alike"), expected)


def test_uniform_numbers_are_spread_evenly():
    drawn = np.array(uniforms("even", 4096))
    assert ((drawn >= 0) & (drawn < 1)).all()
    # Ten cells of about 410: 4.5 standard deviations are 86.
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] - 409.6).max() < 86
