"""GetServerInfo: how the server is set up, and what its ranks have done since start."""

from collections.abc import Sequence

from csps import __version__
from csps.coordinator.counters import LaneCounters
from csps.coordinator.frontend import Frontend
from csps.core.config import ServerConfig
from csps.core.plan import Lane
from csps.rpc.convert_attention import csa_to_proto
from csps.sched.ledger import Ledger
from csps.v1 import generation_pb2 as pb


def server_info(
    front: Frontend, config: ServerConfig, attention_backends: Sequence[str], uptime_s: float
) -> pb.GetServerInfoResponse:
    """Setup and counters."""
    loop, setup = front.loop, config.setup
    scheduler = loop.scheduler
    return pb.GetServerInfoResponse(
        version=__version__,
        strategy=config.strategy.value,
        sp=config.sp,
        tp=setup.tp,
        block_size=setup.block_size,
        blocks_per_rank=scheduler.config.pages_per_rank,
        stage_tokens=scheduler.config.stage_tokens,
        long_tokens=config.long_tokens,
        uptime_s=uptime_s,
        lanes=[_lane(lane, counters, config.num_ranks) for lane, counters in loop.counters.items()],
        used_blocks_by_rank=[
            scheduler.ledger.used_pages(config.kv_shard(rank))
            for rank in range(0, config.num_ranks, setup.tp)
        ],
        attention=config.attention.kind.value,
        csa_gamma=config.attention.gamma,
        csa_min_tokens=config.csa_min_tokens,
        sparse_requests=loop.num_sparse,
        sparse=loop.sparse.to_proto(),
        token_budget=config.token_budget,
        preemptions=scheduler.num_preemptions,
        prefix_cache=_prefix_cache(scheduler.ledger) if config.prefix_cache else None,
        model=front.model.name,
        dtype=setup.dtype.value,
        max_model_len=front.model.max_model_len,
        max_running=config.max_running,
        max_waiting_tokens=config.max_waiting_tokens,
        ageing=config.ageing,
        layout=config.layout.value if config.layout is not None else "",
        shift_threshold=config.shift_threshold,
        tbt_target_ms=config.tbt_target_ms,
        prefill_ranks=config.prefill_ranks,
        decode_ranks=config.decode_ranks,
        threads_per_rank=setup.threads_per_rank,
        csa_window_blocks=config.attention.window_blocks,
        csa=csa_to_proto(setup.csa),
        attention_backends=attention_backends,
    )


def _lane(lane: Lane, counters: LaneCounters, num_ranks: int) -> pb.LaneCounters:
    return pb.LaneCounters(
        lane=lane,
        steps=counters.steps,
        tokens=counters.tokens,
        wall_s=counters.wall_s,
        compute_s=counters.compute_s,
        comm_s=counters.comm_s,
        exposed_comm_s=counters.exposed_comm_s,
        bytes_sent=counters.bytes_sent,
        received_by_rank=[counters.received_by_rank[rank] for rank in range(num_ranks)],
        layouts=[
            pb.LayoutCounters(
                layout=layout,
                steps=sums.steps,
                tokens=sums.tokens,
                wall_s=sums.wall_s,
                predicted_s=sums.predicted_s,
            )
            for layout, sums in counters.by_layout.items()
        ],
    )


def _prefix_cache(ledger: Ledger) -> pb.PrefixCache:
    stats = ledger.cache_stats
    return pb.PrefixCache(
        query_tokens=stats.query_tokens,
        hit_tokens=stats.hit_tokens,
        blocks=stats.num_blocks,
        evictions=stats.num_evictions,
    )
