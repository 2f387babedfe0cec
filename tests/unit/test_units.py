"""Amounts of memory as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.core.errors import ConfigError
from csps.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("512", 512),
        ("7B", 7),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("1TiB", 2**40),
        (" 3 gib ", 3 * 2**30),
    ],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_bytes("--kv-memory", text) == num_bytes


@given(st.integers(1, 2**50))
def test_any_whole_number_of_bytes(num_bytes: int) -> None:
    assert parse_bytes("--kv-memory", f"{num_bytes}") == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "0", "0GiB", "-1GiB", "1e9", "nan", "inf", "2 XiB", "1GiB2", "1,5GB", "K"]
)
def test_what_is_no_amount_names_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--kv-memory: expected an amount"):
        parse_bytes("--kv-memory", text)
