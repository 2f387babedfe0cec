"""Costs of steps whose KV is split by head: layouts TP and SP (Ulysses)."""

from typing import NamedTuple

from csps.core.plan import Layout, StepPlan
from csps.sched.cost import StepShape
from csps.sched.volumes import Volumes
from csps.sim.exchange import Exchange, logits, spread, sums
from csps.sim.fabric import Fabric
from csps.sim.model import ELEMENT_BYTES
from csps.sim.roofline import Compute, Roofline
from csps.sim.step_cost import StepCost, demand_of


class _Way(NamedTuple):
    """One layout. `copies`: ranks among which a step's tokens are dealt out."""

    copies: int
    compute: Compute
    by_token: tuple[Exchange, ...]
    by_row: Exchange


class HeadsCosts:
    """A `StepCosts` of shape and layout alone. Exchanges are not hidden behind computing."""

    def __init__(self, roofline: Roofline, fabric: Fabric) -> None:
        """TP: all tokens and 1/P of the weights on every rank. SP: 1/sp and 1/tp."""
        config, num_ranks = roofline.model.config, fabric.sp * fabric.tp
        everyone, tensor = fabric.everyone, fabric.tensor
        # Two all-to-alls, f (n/P)(2 q + k) a rank (docs/strategies.md); unit: a token per rank.
        volumes = Volumes(config, fabric.sp, ELEMENT_BYTES)
        row = (fabric.sp - 1) * (2 * volumes.query + volumes.kv)
        self._ways = {
            Layout.TP: _Way(
                1,
                roofline.compute(num_ranks, num_ranks),
                (sums(fabric, config, everyone),),
                logits(fabric, config, everyone),
            ),
            Layout.SP: _Way(
                fabric.sp,
                roofline.compute(fabric.tp, num_ranks),
                (sums(fabric, config, tensor), spread("heads", fabric, config, row, 2)),
                logits(fabric, config, tensor),
            ),
        }

    def cost(self, plan: StepPlan, layout: Layout, shape: StepShape) -> StepCost:
        del plan
        return self.of_shape(shape, layout)

    def released(self, seq_ids: list[int]) -> None:
        del seq_ids  # KV lies alike on all ranks

    def of_shape(self, shape: StepShape, layout: Layout) -> StepCost:
        way = self._ways[layout]
        tokens, rows = -(-shape.num_tokens // way.copies), shape.num_sequences
        busy = way.compute.busy(tokens, rows, shape.num_pairs, shape.num_keys)
        transfer_s = rows * way.by_row.unit_s
        latency_s = way.by_row.latency_s
        sent = {}
        if way.by_row.unit_bytes:
            sent[way.by_row.kind] = int(rows * way.by_row.unit_bytes)
        for exchange in way.by_token:
            if not exchange.unit_bytes:  # nobody to exchange with
                continue
            transfer_s += tokens * exchange.unit_s
            latency_s += exchange.latency_s
            sent[exchange.kind] = int(tokens * exchange.unit_bytes)
        comm_s = transfer_s + latency_s
        return StepCost(
            compute_s=busy.seconds,
            comm_s=comm_s,
            exposed_comm_s=comm_s,
            demand=demand_of(busy, transfer_s, busy.seconds + comm_s),
            bytes_sent=sent,
            dense_bytes=sum(sent.values()),
        )
