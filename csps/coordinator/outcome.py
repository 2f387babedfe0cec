"""What a request has come to, for the end of its stream in any protocol."""

from csps.coordinator.frontend import elapsed
from csps.coordinator.live import LiveRequest
from csps.rpc.convert_attention import ATTENTION_TO_PROTO
from csps.v1 import generation_pb2 as pb


def usage(live: LiveRequest, num_output: int) -> pb.Usage:
    """Token counts; `num_output`: those that its stream gave out."""
    return pb.Usage(
        prompt_tokens=len(live.seq.prompt_ids),
        output_tokens=num_output,
        cached_tokens=live.seq.num_cached or 0,
    )


def timings(live: LiveRequest) -> pb.Timings:
    """Seconds from the request's arrival."""
    return pb.Timings(
        queued_s=elapsed(live, live.queued),
        first_scheduled_s=elapsed(live, live.first_scheduled),
        first_token_s=elapsed(live, live.first_token),
        last_token_s=elapsed(live, live.last_token),
    )


def attention_report(live: LiveRequest) -> pb.AttentionReport | None:
    """What its prefill approximated; None if that was dense."""
    params = live.seq.attention
    if not params.is_sparse or not live.sparse.causal_pairs:
        return None
    report = live.sparse.to_proto()
    report.kind = ATTENTION_TO_PROTO[params.kind]
    report.gamma = params.gamma
    return report
