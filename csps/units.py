"""Quantities as people write them."""

import re

from csps.core.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


def parse_bytes(flag: str, text: str) -> int:
    """2GiB -> 2147483648. ConfigError naming `flag` if it is no amount of memory."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ConfigError(f"{flag}: expected an amount such as 512MiB or 2GB, got {text!r}")
    return int(float(match[1]) * unit)
