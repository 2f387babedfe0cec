"""Strategies: each is a placement of KV, the layouts of its steps, its lanes and its attention.

Placement never changes while a request lives; the layout may change at every step.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from csps.core.attention import AttentionKind
from csps.core.plan import Lane, Layout


class Placement(StrEnum):
    """What part of a token's KV a rank holds; with TOKENS, heads go over tp besides."""

    TOKENS = "tokens"  # all of it for some blocks: KV is spread by token range over sp
    HEADS = "heads"  # some heads of every block: KV is spread by head over all ranks

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Lanes of a server: prefill apart from decode, or both in one."""
        if self is Placement.TOKENS:
            return (Lane.PREFILL, Lane.DECODE)
        return (Lane.MIXED,)


class Strategy(StrEnum):
    """What --strategy names; see STRATEGIES."""

    CSPS = "csps"
    RING = "ring"
    SARATHI = "sarathi"
    SHIFT = "shift"


class StrategySpec(NamedTuple):
    """`layouts`: those that the steps of each lane may have.

    `attention`: of requests that do not choose.
    """

    placement: Placement
    layouts: Mapping[Lane, tuple[Layout, ...]]
    attention: AttentionKind


_EITHER = (Layout.SP, Layout.TP)

STRATEGIES: Mapping[Strategy, StrategySpec] = {
    Strategy.CSPS: StrategySpec(
        Placement.TOKENS, {Lane.PREFILL: (Layout.SP,), Lane.DECODE: _EITHER}, AttentionKind.CSA
    ),
    Strategy.RING: StrategySpec(
        Placement.TOKENS,
        {Lane.PREFILL: (Layout.SP,), Lane.DECODE: (Layout.SP,)},
        AttentionKind.DENSE,
    ),
    Strategy.SARATHI: StrategySpec(
        Placement.HEADS, {Lane.MIXED: (Layout.TP,)}, AttentionKind.DENSE
    ),
    Strategy.SHIFT: StrategySpec(Placement.HEADS, {Lane.MIXED: _EITHER}, AttentionKind.DENSE),
}


def lane_layouts(strategy: Strategy, lane: Lane, fixed: Layout | None) -> tuple[Layout, ...]:
    """Those that a step of the lane may have, `fixed` being what --layout says."""
    layouts = STRATEGIES[strategy].layouts[lane]
    return (fixed,) if fixed in layouts else layouts
