"""What flags of `csps serve` mean; ConfigError names the flag that does not fit."""

from csps.core.attention import AttentionKind, AttentionParams
from csps.core.errors import ConfigError, InvalidRequestError
from csps.core.strategy import STRATEGIES, Placement, Strategy

_FLAG_OF_FIELD = {"attention.gamma": "--csa-gamma", "attention.window_blocks": "--csa-window"}

MAX_TBT_TARGET_MS = 60_000.0


def parse_num_ranks(workers: int, ranks: int) -> int:
    """Ranks in all, started here or joined."""
    if bool(workers) == bool(ranks):
        raise ConfigError("--workers, --ranks: give one of them (ranks started here, or joined)")
    return workers or ranks


def parse_tp(strategy: Strategy, tp: int, num_ranks: int) -> int:
    """Ranks each weight is split over; 0 leaves it to the strategy."""
    if strategy is Strategy.SARATHI:
        if tp not in (0, num_ranks):
            raise ConfigError(
                f"--tp: --strategy sarathi splits the weights over all ranks, {num_ranks}, not {tp}"
            )
        return num_ranks
    tp = tp or 1
    if num_ranks % tp:
        raise ConfigError(f"--tp: {tp} does not divide the number of ranks, {num_ranks}")
    return tp


def parse_share(flag: str, share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{flag}: expected a share in (0, 1], got {share}")
    return share


def parse_tbt_target(milliseconds: float) -> float:
    if not 0.0 <= milliseconds <= MAX_TBT_TARGET_MS:  # NaN neither
        raise ConfigError(
            f"--tbt-target: expected 0 to {MAX_TBT_TARGET_MS:g} milliseconds, got {milliseconds:g}"
        )
    return milliseconds


def step_tokens(
    strategy: Strategy, *, stage_tokens: int, long_tokens: int, token_budget: int, max_running: int
) -> int:
    """New tokens that one rank computes at a time, at most, in all lanes."""
    if STRATEGIES[strategy].placement is Placement.HEADS:
        return max(token_budget, max_running)
    # Short prompts of a step may all be on one rank, and split ones on the same rank alone.
    return max(stage_tokens, long_tokens) + stage_tokens + max_running


def parse_ranks(flag: str, text: str, num_ranks: int) -> tuple[int, ...]:
    """Ranks of the sequence axis from "0-2,5", ascending; empty stays empty."""
    if not text:
        return ()
    ranks: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ConfigError(f"{flag}: expected ranks such as 0-2 or 0,2, got {text!r}")
        ranks.update(range(int(first), int(last or first) + 1))
    if not ranks or max(ranks) >= num_ranks:
        raise ConfigError(f"{flag}: ranks go from 0 to {num_ranks - 1}, got {text!r}")
    return tuple(sorted(ranks))


def parse_control_address(control: str) -> tuple[str, int]:
    host, _, port = control.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--control: expected HOST:PORT, got {control!r}")
    return host, int(port)


def parse_attention(
    strategy: Strategy, kind: AttentionKind | None, gamma: float, window_blocks: int
) -> AttentionParams:
    """How requests that do not choose are prefilled."""
    spec = STRATEGIES[strategy]
    params = AttentionParams(kind or spec.attention, gamma, window_blocks)
    if params.is_sparse and spec.placement is not Placement.TOKENS:
        raise ConfigError(
            f"--attention: {params.kind} needs KV spread by tokens (--strategy csps or ring)"
        )
    try:
        params.validate()
    except InvalidRequestError as error:  # it names a request's field
        raise ConfigError(f"{_FLAG_OF_FIELD[error.field]}: {error.problem}") from None
    return params


def parse_on_off(flag: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError(f"{flag}: expected on or off, got {value!r}")
    return value == "on"
