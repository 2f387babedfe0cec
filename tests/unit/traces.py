"""Random traces, for tests: sessions whose prompts grow out of earlier ones."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from csps.trace.schema import Trace, TraceRequest

BLOCK_TOKENS = 64
# A busy machine is no failure.
AT_ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Requests keep some blocks of an earlier one of their session, all else is theirs."""
    requests: list[TraceRequest] = []
    fresh, now = 0, 0.0
    for _ in range(draw(st.integers(1, 12))):
        session = draw(st.integers(0, 3))
        earlier = [r for r in requests if r.session == session]
        kept: tuple[int, ...] = ()
        if earlier:
            whole = draw(st.sampled_from(earlier)).blocks
            kept = whole[: draw(st.integers(0, len(whole)))]
        num_new = draw(st.integers(0 if kept else 1, 6))
        blocks = kept + tuple(range(fresh, fresh + num_new))
        fresh += num_new
        now = round(now + draw(st.floats(0, 100)), 6)
        requests.append(
            TraceRequest(
                arrival_s=now,
                prompt_tokens=len(blocks) * BLOCK_TOKENS - draw(st.integers(0, BLOCK_TOKENS - 1)),
                output_tokens=draw(st.integers(1, 500)),
                blocks=blocks,
                session=session,
                turn=len(earlier) + 1,
            )
        )
    return Trace("random", "a test", BLOCK_TOKENS, tuple(requests))


def num_shared(a: TraceRequest, b: TraceRequest) -> int:
    """Leading blocks in common."""
    num = 0
    while num < min(len(a.blocks), len(b.blocks)) and a.blocks[num] == b.blocks[num]:
        num += 1
    return num
