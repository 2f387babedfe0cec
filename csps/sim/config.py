"""What is simulated: flags of a server, and of the studies that no live server can do."""

from dataclasses import dataclass, field

from csps.core.attention import AttentionKind, AttentionParams, CsaConfig
from csps.core.config import STAGE_TOKENS, ServerConfig, WorkerSetup
from csps.core.errors import ConfigError, InvalidRequestError
from csps.core.plan import Layout
from csps.core.strategy import STRATEGIES, Placement, Strategy
from csps.sim.cluster import AnalyticCluster, CalibratedCluster, Cluster
from csps.sim.cost_decode import DecodeMoves
from csps.sim.model import SimModel

UNLIMITED = 10**12  # tokens
STAGE_TOKENS_PER_RANK = 1024
MAX_RUNNING = 256
_SERVER = ServerConfig(WorkerSetup(""))  # its defaults


@dataclass(frozen=True, slots=True)
class SimConfig:
    """One simulated deployment: `replicas` servers of sp x tp ranks each.

    0 means, for `sp` and `tp`: all GPUs of the replica, weights split as little as fits (sarathi:
    over all; a calibrated cluster: as measured). For `stage_tokens`: 1,024 per rank of the
    sequence axis, at least a server's default, or as measured; `long_tokens`: one block for each
    of the 2 sp runs of a zigzag, at least a server's default; on a calibrated cluster that.
    `max_running`: 256, on a calibrated cluster a server's default. `block_size`: 64, or as
    measured. `kv_pages`: what memory leaves, or as measured. `max_model_len`: as long as the KV.

    Other names as in csps.core.config. `attention` None: the strategy's. `pipeline`: exchanges of
    prefill run beside its computing. `separate_decode` False: lanes take turns. `speed` is a
    factor on the trace's clock. `seed` breaks ties between replicas. `keep_steps` False: no rows
    of steps, for searches.
    """

    strategy: Strategy = Strategy.CSPS
    sp: int = 0
    tp: int = 0
    replicas: int = 1
    block_size: int = 0
    token_budget: int = _SERVER.token_budget
    stage_tokens: int = 0
    long_tokens: int = 0
    ageing: float = _SERVER.ageing
    max_running: int = 0
    max_waiting_tokens: int = UNLIMITED
    max_model_len: int = 0
    kv_pages: int = 0
    prefix_cache: bool = True
    layout: Layout | None = None
    shift_threshold: int = 0
    tbt_target_ms: float = 0.0
    attention: AttentionKind | None = None
    csa: CsaConfig = field(default_factory=CsaConfig)
    csa_gamma: float = AttentionParams().gamma
    csa_min_tokens: int = _SERVER.csa_min_tokens
    pipeline: bool = True
    separate_decode: bool = True
    decode_moves: DecodeMoves = DecodeMoves.QUERIES
    speed: float = 1.0
    seed: int = 0
    slo_ttft_s: float | None = None
    slo_tbt_ms: float | None = None
    keep_steps: bool = True
    name: str | None = None


def server_config(config: SimConfig, cluster: Cluster, model: SimModel) -> ServerConfig:
    """The flags of one replica's server. ConfigError names the flag that does not fit."""
    if not config.speed > 0:
        raise ConfigError(f"--speed: must be above 0, got {config.speed:g}")
    block_size = config.block_size or _SERVER.setup.block_size
    if isinstance(cluster, CalibratedCluster):
        server = cluster.server(config.strategy)
        _check_calibrated(config, cluster)
        sp, tp, block_size = server.sp, server.tp, config.block_size or server.block_size
        stage_tokens = config.stage_tokens or server.stage_tokens
        long_tokens = config.long_tokens or _SERVER.long_tokens
        max_running = config.max_running or _SERVER.max_running
    else:
        sp, tp = _mesh(config, cluster, model)
        stage_tokens = config.stage_tokens or max(STAGE_TOKENS_PER_RANK * sp, STAGE_TOKENS["cuda"])
        long_tokens = config.long_tokens or max(2 * sp * block_size, _SERVER.long_tokens)
        max_running = config.max_running or MAX_RUNNING
    spec = STRATEGIES[config.strategy]
    params = AttentionParams(config.attention or spec.attention, config.csa_gamma)
    if params.kind is AttentionKind.CSA_DISTANCE:
        raise ConfigError("--attention: its density was not measured by length: dense or csa")
    if params.is_sparse and spec.placement is not Placement.TOKENS:
        raise ConfigError("--attention: csa needs KV spread by tokens (--strategy csps or ring)")
    try:
        params.validate()
    except InvalidRequestError as error:
        raise ConfigError(f"--csa-gamma: {error.problem}") from None
    csa = CsaConfig(
        rows_per_tile=config.csa.rows_per_tile, wire=config.csa.wire, pipeline=config.pipeline
    )
    return ServerConfig(
        setup=WorkerSetup(
            model=model.name, block_size=block_size, tp=tp, placement=spec.placement, csa=csa
        ),
        strategy=config.strategy,
        num_ranks=sp * tp,
        long_tokens=long_tokens,
        stage_tokens=stage_tokens,
        token_budget=config.token_budget,
        layout=config.layout,
        shift_threshold=config.shift_threshold,
        tbt_target_ms=config.tbt_target_ms,
        ageing=config.ageing,
        prefix_cache=config.prefix_cache,
        attention=params,
        csa_min_tokens=config.csa_min_tokens,
        max_running=max_running,
        max_waiting_tokens=config.max_waiting_tokens,
    )


def _check_calibrated(config: SimConfig, cluster: CalibratedCluster) -> None:
    """What a fitted model cannot tell."""
    asked = {
        "--sp": config.sp != 0,
        "--tp": config.tp != 0,
        "--replicas": config.replicas != 1,
        "--no-pipeline": not config.pipeline,
        "--decode-moves": config.decode_moves is not DecodeMoves.QUERIES,
        "--attention": config.attention is not None,
    }
    for flag, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"{flag}: {cluster.name} only knows servers as they were measured")


def _mesh(config: SimConfig, cluster: AnalyticCluster, model: SimModel) -> tuple[int, int]:
    """sp and tp of a replica."""
    if config.replicas < 1 or cluster.num_gpus % config.replicas:
        raise ConfigError(
            f"--replicas: {config.replicas} do not divide the {cluster.num_gpus} GPUs of "
            f"{cluster.name}"
        )
    num_ranks = cluster.num_gpus // config.replicas
    sp, tp = config.sp, config.tp
    if config.strategy is Strategy.SARATHI:
        tp = tp or num_ranks
        if sp > 1 or tp != num_ranks:
            raise ConfigError(
                f"--tp: sarathi splits the weights over all ranks, {num_ranks}: use --replicas"
            )
    if not tp:
        tp = num_ranks // sp if sp else _least_tp(cluster, model, num_ranks)
    sp = sp or num_ranks // tp
    if sp * tp != num_ranks:
        raise ConfigError(f"--sp, --tp: {sp} x {tp} are not the {num_ranks} GPUs of a replica")
    return sp, tp


def _least_tp(cluster: AnalyticCluster, model: SimModel, num_ranks: int) -> int:
    """The fewest ranks that the weights can be split over, with half of the memory left for KV."""
    usable = cluster.gpu.memory_bytes * cluster.efficiency.memory
    fitting = [
        tp
        for tp in range(1, num_ranks + 1)
        if num_ranks % tp == 0 and model.weight_bytes / tp <= usable / 2
    ]
    return fitting[0] if fitting else num_ranks


def kv_pages(config: SimConfig, server: ServerConfig, cluster: Cluster, model: SimModel) -> int:
    """KV pages of a rank. ConfigError says what the model needs if it does not fit."""
    if config.kv_pages:
        return config.kv_pages
    if isinstance(cluster, CalibratedCluster):
        return cluster.server(config.strategy).pages_per_rank
    tp = server.setup.tp
    parts = tp if server.setup.placement is Placement.TOKENS else server.num_ranks
    usable = cluster.gpu.memory_bytes * cluster.efficiency.memory
    weights = model.weight_bytes / tp
    page = server.setup.block_size * model.kv_token_bytes(parts)
    pages = int((usable - weights) / page)
    if pages < 1:
        raise ConfigError(
            f"--model: {model.name} in {model.weights} weighs {model.weight_bytes / 1e9:.1f} GB, "
            f"{weights / 1e9:.1f} GB per GPU split over {tp}; the GPUs of {cluster.name} have "
            f"{usable / 1e9:.1f} GB for weights and KV: use a larger --tp or fewer --replicas"
        )
    return pages
