"""How much of a prompt sparse prefill keeps: a measured table (density.toml says where)."""

import math
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from csps.core.errors import ConfigError


class Kept(NamedTuple):
    """`density` of pairs, `union_density` of remote blocks (what the network sees)."""

    density: float
    union_density: float
    recall: float


EVERYTHING = Kept(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class DensityTable:
    """What is kept at one gamma, by prompt length, ascending."""

    lengths: Sequence[int]
    kept: Sequence[Kept]

    def at(self, num_tokens: int) -> Kept:
        """Of a prompt of `num_tokens` tokens, by the rule that density.toml states."""
        if num_tokens < self.lengths[0]:
            return EVERYTHING
        if num_tokens >= self.lengths[-1]:
            return self.kept[-1]
        right = max(bisect_left(self.lengths, num_tokens), 1)
        low, high = self.lengths[right - 1], self.lengths[right]
        share = math.log(num_tokens / low) / math.log(high / low)
        pairs = zip(self.kept[right - 1], self.kept[right], strict=True)
        return Kept(*(a + share * (b - a) for a, b in pairs))


def density_table(gamma: float) -> DensityTable:
    """ConfigError if gamma was never measured."""
    if gamma == 1.0:
        return DensityTable((0,), (EVERYTHING,))
    text = resources.files("csps.sim").joinpath("density.toml").read_text("utf-8")
    rows = tomllib.loads(text)["measured"]
    found = sorted((row for row in rows if row["gamma"] == gamma), key=lambda row: row["tokens"])
    if not found:
        known = ", ".join(str(value) for value in sorted({row["gamma"] for row in rows}))
        raise ConfigError(f"--csa-gamma: density was measured at {known}, not at {gamma}")
    return DensityTable(
        tuple(row["tokens"] for row in found),
        tuple(Kept(row["density"], row["union_density"], row["recall"]) for row in found),
    )
