"""Costs of prefill steps whose KV is spread over ranks by token range: ring, and CSA.

Each rank computes its slices; what they cost is added up by rank, and the step takes as long as
its slowest one.
"""

from csps.core.attention import CsaConfig, Wire
from csps.core.plan import StepPlan, Work
from csps.sched.cost import StepShape
from csps.sched.ledger import Ledger
from csps.sched.volumes import Volumes
from csps.sim.density import EVERYTHING, DensityTable, Kept
from csps.sim.exchange import sums
from csps.sim.fabric import Fabric
from csps.sim.model import ELEMENT_BYTES
from csps.sim.roofline import Roofline
from csps.sim.step_cost import StepCost, demand_of

# Exchanges of a sparse layer: rows, log-sum-exps, masses, bitmaps, blocks.
SPARSE_EXCHANGES = 5
# Micro-partitions of a sparse layer: by KV heads, a single one by tiles (csps.attention.transfer).
MAX_PARTITIONS, MIN_PARTITIONS = 4, 2
PROBES = 2  # per tile and KV head


class StepLoad:
    """One step's work by rank of the sequence axis, per layer; bytes of all tensor columns."""

    def __init__(self, num_ranks: int) -> None:
        self.tokens = [0] * num_ranks
        self.pairs = [0.0] * num_ranks  # as many as dense attention of the same time has
        self.ring_bytes = [0.0] * num_ranks
        self.fetch_bytes = [0.0] * num_ranks  # and shipped queries: evenly to others
        self.sent = dict.fromkeys(("kv", "query", "rows", "mass", "lse"), 0.0)
        self.dense_bytes = 0.0
        self.rings = self.ships = self.fetches = False
        self.kept_pairs = 0.0
        self.sparse_pairs = 0.0
        self.recall = 1.0

    def send(self, kind: str, num_bytes: float, by: list[float], holders: list[int]) -> None:
        """`num_bytes` in all, which `holders` send evenly."""
        self.sent[kind] += num_bytes
        for rank in holders:
            by[rank] += num_bytes / len(holders)


class PrefillCosts:
    """Steps of prompts, in layout SP."""

    def __init__(
        self,
        roofline: Roofline,
        fabric: Fabric,
        ledger: Ledger,
        csa: CsaConfig,
        density: DensityTable,
    ) -> None:
        self._config = roofline.model.config
        self._fabric = fabric
        self._ledger = ledger
        self._csa = csa
        self._density = density
        self._compute = roofline.compute(fabric.tp, fabric.tp)
        self._sums = sums(fabric, self._config, fabric.tensor)
        # By byte that a rank sends: all tensor columns send at once.
        layers, group = self._config.num_layers, fabric.sequence
        self._ring_s = layers * fabric.ring(group, 1 / fabric.tp)
        self._fetch_s = layers * fabric.all_to_all(group, 1 / fabric.tp)

    def cost(self, plan: StepPlan, shape: StepShape) -> StepCost:
        """Attention hides exchanges of the same step (pipeline on), but those of the first
        micro-partition of a sparse layer, before which there is nothing to compute.
        """
        load = StepLoad(self._fabric.sp)
        for work in plan.work:
            self._add(load, work)
        rows = sum(work.sample for work in plan.work)
        sums_s = max(load.tokens) * self._sums.unit_s + self._sums.latency_s
        latency_s = self._latency(load)
        slowest = max(
            (self._of_rank(load, rank, rows, sums_s, latency_s) for rank in range(self._fabric.sp)),
            key=_wall_s,
        )
        layers = self._config.num_layers
        hidden = int(sum(load.tokens) / self._fabric.sp * self._sums.unit_bytes)
        sent = {kind: int(layers * num) for kind, num in load.sent.items() if num}
        causal = shape.num_pairs + shape.num_keys
        skipped = load.sparse_pairs - load.kept_pairs
        return slowest._replace(
            bytes_sent={**sent, "hidden": hidden} if hidden else sent,
            dense_bytes=int(layers * load.dense_bytes) + hidden,
            density=1 - skipped / causal if load.sparse_pairs else None,
            recall=load.recall if load.sparse_pairs else None,
        )

    def _of_rank(
        self, load: "StepLoad", rank: int, rows: int, sums_s: float, latency_s: float
    ) -> StepCost:
        """`latency_s`: of exchanges over the sequence axis."""
        pairs = load.pairs[rank]
        busy = self._compute.busy(load.tokens[rank], rows, pairs, 0)
        fetch_s = load.fetch_bytes[rank] * self._fetch_s
        transfer_s = load.ring_bytes[rank] * self._ring_s + fetch_s
        exposed_s = transfer_s + latency_s
        if self._csa.pipeline:
            lead_s = fetch_s / self._partitions if load.fetches else 0.0
            exposed_s = max(exposed_s - pairs * self._compute.pair_flops_s, lead_s)
        exposed_s += sums_s
        return StepCost(
            compute_s=busy.seconds,
            comm_s=transfer_s + latency_s + sums_s,
            exposed_comm_s=exposed_s,
            demand=demand_of(busy, transfer_s + sums_s, busy.seconds + exposed_s),
            bytes_sent={},
        )

    @property
    def _partitions(self) -> int:
        heads = -(-self._config.num_kv_heads // self._fabric.tp)
        return min(max(heads, MIN_PARTITIONS), MAX_PARTITIONS)

    def _add(self, load: StepLoad, work: Work) -> None:
        kept = EVERYTHING
        if work.attention.is_sparse:
            kept = self._density.at(work.stop)
        # Scoring is m/(2B) of dense attention (docs/sparse-attention.md).
        scoring = self._csa.rows_per_tile / (2 * self._ledger.block_size)
        share = kept.density + (scoring if kept.density < 1 else 0.0)
        pairs = 0
        for rank, start, stop in work.slices:
            num = stop - start
            seen = num * start + num * (num + 1) // 2
            load.tokens[rank] += num
            load.pairs[rank] += seen * share
            pairs += seen
        if work.attention.is_sparse:
            load.sparse_pairs += pairs
            load.kept_pairs += pairs * kept.density
            load.recall = min(load.recall, kept.recall)
        blocks = self._ledger.blocks_by_rank(work.seq_id)
        holders = [rank for rank, num in enumerate(blocks) if num]
        if len(holders) > 1:
            self._exchange(load, work, kept, holders, pairs)

    def _exchange(
        self, load: StepLoad, work: Work, kept: Kept, holders: list[int], pairs: int
    ) -> None:
        """Bytes between the ranks that hold the sequence, of all tensor columns together."""
        volumes = Volumes(self._config, len(holders), ELEMENT_BYTES)
        ring = volumes.ring(work.stop)
        # Keys behind cached or earlier ones: queries may be fewer bytes than those.
        ship = volumes.ship(work.num_tokens)
        load.dense_bytes += min(ring, ship)
        if kept.density < 1:
            self._select(load, work, holders, pairs)
            blocks = kept.union_density * ring
            if self._csa.wire is Wire.INT8:
                head_dim = self._config.head_dim
                blocks *= (head_dim + 2) / (2 * head_dim)
            load.send("kv", blocks, load.fetch_bytes, holders)
            load.fetches = True
        elif ship < ring:
            load.send("query", ship, load.fetch_bytes, holders)
            load.ships = True
        else:
            load.send("kv", ring, load.ring_bytes, holders)
            load.rings = True

    def _select(self, load: StepLoad, work: Work, holders: list[int], pairs: int) -> None:
        """What choosing blocks moves: docs/sparse-attention.md, "What it costs"."""
        config, size = self._config, self._ledger.block_size
        others = len(holders) - 1
        heads, rows = config.num_kv_heads, self._csa.rows_per_tile * config.group_size
        tiles = work.num_tokens / size
        probes = PROBES * ELEMENT_BYTES * config.head_dim
        load.send(
            "rows",
            others * tiles * heads * (rows * (config.head_dim + 2) + probes),
            load.fetch_bytes,
            holders,
        )
        load.send("lse", others * tiles * heads * 4 * (rows + PROBES), load.fetch_bytes, holders)
        visible = pairs / size**2 * others / len(holders)
        load.send("mass", 6 * visible * heads, load.fetch_bytes, holders)

    def _latency(self, load: StepLoad) -> float:
        """Of all layers' exchanges over the sequence axis."""
        fabric = self._fabric
        collective_s = fabric.collective_s(fabric.sequence)
        latency_s = fabric.ring_latency(fabric.sequence) if load.rings else 0.0
        latency_s += 2 * collective_s if load.ships else 0.0
        latency_s += SPARSE_EXCHANGES * collective_s if load.fetches else 0.0
        return self._config.num_layers * latency_s


def _wall_s(cost: StepCost) -> float:
    return cost.wall_s
