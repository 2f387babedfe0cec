"""Costs of decode steps whose KV is spread over ranks by token range."""

from enum import StrEnum

from csps.core.plan import Layout
from csps.sched.cost import StepShape
from csps.sched.volumes import Volumes
from csps.sim.exchange import Exchange, spread, sums
from csps.sim.fabric import Fabric
from csps.sim.holdings import Spread
from csps.sim.model import ELEMENT_BYTES
from csps.sim.roofline import Busy, Roofline
from csps.sim.step_cost import StepCost, demand_of


class DecodeMoves(StrEnum):
    """What travels when a token attends to KV on other ranks."""

    QUERIES = "q"  # the query there, partial output and log-sum-exp back
    KV = "kv"  # keys and values to the token's master: for comparison, no server does it


class DecodeCosts:
    """Steps of single tokens. Exchanges are not hidden behind computing.

    SP: a token's linear layers run on its master, which ships its query (2 q + 4 Hq per other
    holder, two exchanges a layer), or fetches its KV (k per remote key, one exchange). TP: they
    run on all ranks (Helix, arXiv 2507.07120): q, k, v to all, partials back, two sums.
    """

    def __init__(self, roofline: Roofline, fabric: Fabric, moves: DecodeMoves) -> None:
        config, num_ranks = roofline.model.config, fabric.sp * fabric.tp
        volumes = Volumes(config, fabric.sp, ELEMENT_BYTES)
        self.sp = fabric.sp
        self._moves_kv = moves is DecodeMoves.KV
        self._sp_compute = roofline.compute(fabric.tp, fabric.tp)
        self._tp_compute = roofline.compute(num_ranks, fabric.tp)
        self._tensor_sums = sums(fabric, config, fabric.tensor)
        self._sums = sums(fabric, config, fabric.everyone)
        # Units: a query to one rank; a key; a token.
        self._ship = spread("query", fabric, config, volumes.shipped, 2)
        self._fetch = spread("kv", fabric, config, volumes.kv, 1)
        helix = volumes.helix(1) - volumes.all_reduces(1)
        self._helix = spread("query", fabric, config, helix, 2)

    def cost(self, shape: StepShape, layout: Layout, spread: Spread) -> StepCost:
        tokens = shape.num_tokens
        if layout is Layout.TP:
            keys = shape.num_keys * spread.kv_share
            busy = self._tp_compute.busy(tokens, tokens, 0, keys)
            return _total(busy, [(self._helix, tokens, 1.0), (self._sums, tokens, 1.0)])
        busiest = spread.masters / tokens
        # Exchanges are timed as if even; the rank that masters most takes longer.
        exchanges = [(self._tensor_sums, tokens / self.sp, busiest * self.sp)]
        if spread.trips and self._moves_kv:
            moved = shape.num_keys * spread.remote_share
            exchanges.append((self._fetch, moved, busiest * self.sp))
        elif spread.trips:
            exchanges.append((self._ship, spread.trips, busiest * self.sp))
        # Where KV moves to the masters it is read there.
        share = busiest if self._moves_kv else spread.kv_share
        busy = self._sp_compute.busy(spread.masters, spread.masters, 0, shape.num_keys * share)
        return _total(busy, exchanges)


def _total(busy: Busy, exchanges: list[tuple[Exchange, float, float]]) -> StepCost:
    """Exchanges of so many units, whose busiest rank has so many times the mean."""
    transfer_s = latency_s = 0.0
    sent: dict[str, int] = {}
    for exchange, units, uneven in exchanges:
        if not exchange.unit_bytes:  # nobody to exchange with
            continue
        transfer_s += units * uneven * exchange.unit_s
        latency_s += exchange.latency_s
        sent[exchange.kind] = int(units * exchange.unit_bytes)
    comm_s = transfer_s + latency_s
    return StepCost(
        compute_s=busy.seconds,
        comm_s=comm_s,
        exposed_comm_s=comm_s,
        demand=demand_of(busy, transfer_s, busy.seconds + comm_s),
        bytes_sent=sent,
        dense_bytes=sum(sent.values()),
    )
