"""Sampling and text as clients get them."""

import threading

import pytest

from csps.checkpoint.locate import locate
from csps.checkpoint.tokenizer import load_tokenizer
from csps.v1 import generation_pb2 as pb
from tests.e2e.harness import Answer, Running, prompt, request, serve

LONG, SHORT = prompt(300), prompt(20)


def together(server: Running, *requests: pb.GenerateRequest) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(requests)

    def run(index: int) -> None:
        answers[index] = server.generate(requests[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in answers
    return answers


@pytest.mark.parametrize("ids", [LONG, SHORT], ids=["spanning", "whole"])
def test_a_seed_repeats_alone_and_in_a_batch(two_ranks: Running, ids: list[int]) -> None:
    seeded = request(ids, temperature=1.0, seed=11, max_tokens=30, ignore_eos=True)
    alone = two_ranks.generate(seeded).token_ids
    others = [request(prompt(50, n), temperature=1.0, max_tokens=40) for n in range(4)]
    assert together(two_ranks, seeded, *others)[0].token_ids == alone
    free = request(ids, temperature=1.0, max_tokens=30, ignore_eos=True)
    assert two_ranks.generate(free).token_ids != two_ranks.generate(free).token_ids


def test_greedy_and_its_logprobs(two_ranks: Running) -> None:
    greedy = two_ranks.generate(request(LONG, max_tokens=12, ignore_eos=True, logprobs=3))
    one = request(LONG, temperature=1.0, top_k=1, seed=1, max_tokens=12, ignore_eos=True)
    assert two_ranks.generate(one).token_ids == greedy.token_ids
    assert len(greedy.logprobs) == 12
    for token_id, entry in zip(greedy.token_ids, greedy.logprobs, strict=True):
        assert entry.top[0].token_id == token_id
        assert len(entry.top) == 3
        assert entry.logprob == entry.top[0].logprob <= 0.0


def test_text_is_the_tokens_text_and_stops_cut_it(two_ranks: Running, tiny) -> None:
    whole = two_ranks.generate(request(LONG, max_tokens=40, ignore_eos=True))
    text = load_tokenizer(locate(str(tiny))).decode(whole.token_ids)
    assert whole.text == text
    stop = text[10:14]
    cut = two_ranks.generate(request(LONG, max_tokens=40, ignore_eos=True, stop=[stop]))
    assert cut.text == text[: text.index(stop)]
    assert cut.complete.finish_reason == pb.FINISH_REASON_STOP


def test_stop_ids_and_min_tokens(two_ranks: Running) -> None:
    free = two_ranks.generate(request(SHORT, max_tokens=20, ignore_eos=True)).token_ids
    stop = free[3]
    early = two_ranks.generate(
        request(SHORT, max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    )
    assert early.token_ids == free[: free.index(stop) + 1]
    assert early.complete.finish_reason == pb.FINISH_REASON_STOP
    late = two_ranks.generate(
        request(SHORT, max_tokens=20, ignore_eos=True, stop_token_ids=[stop], min_tokens=10)
    )
    assert stop not in late.token_ids[:10]
    assert len(late.token_ids) >= 10


def test_usage_and_timings(two_ranks: Running) -> None:
    complete = two_ranks.generate(request(LONG, max_tokens=7, ignore_eos=True)).complete
    assert complete.finish_reason == pb.FINISH_REASON_LENGTH
    assert (complete.usage.prompt_tokens, complete.usage.output_tokens) == (300, 7)
    times = complete.timings
    assert 0 < times.queued_s <= times.first_scheduled_s < times.first_token_s < times.last_token_s


def test_preempted_streams_draw_the_same_tokens(two_ranks: Running, tiny) -> None:
    """KV for a third of what the streams grow to: some are thrown out and recomputed."""
    requests = [request(prompt(60, n), max_tokens=150, ignore_eos=True) for n in range(4)]
    expected = [two_ranks.generate(one).token_ids for one in requests]
    # A page of 16 tokens is 16 * 2 * 3 layers * 3 heads * 16 * 4 bytes = 18,432 bytes.
    flags = ("--model", str(tiny), "--dtype", "float32", "--block-size", "16")
    with serve(*flags, "--kv-memory", "400000") as small:
        assert [answer.token_ids for answer in together(small, *requests)] == expected
        prefill = next(lane for lane in small.info().lanes if lane.lane == "prefill")
        assert prefill.tokens > 4 * 60, "nothing was recomputed"
