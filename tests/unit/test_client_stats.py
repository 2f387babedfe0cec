"""What the client side computes: prompts in, latencies and reports out. No server."""

import asyncio
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csps.bench import record
from csps.bench.interference import overlapping_gaps_ms
from csps.bench.measure import ServerFlags, lane_delta, prompt_ids
from csps.bench.steps import decode_bytes_per_token
from csps.checkpoint.locate import DEFAULT_MODEL
from csps.core.errors import ConfigError, InvalidRequestError
from csps.core.request import SamplingParams
from csps.percentiles import gaps_ms, percentile
from csps.rpc.client import GenerationClient, ServerError
from csps.submit import read_prompt
from csps.v1 import generation_pb2 as pb

NOWHERE = "127.0.0.1:1"  # tcpmux: nobody listens there


def test_percentile_is_nearest_rank() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]  # the textbook's example
    assert [percentile(values, p) for p in (0.05, 0.3, 0.4, 0.5, 1.0)] == [15, 20, 20, 35, 50]
    assert percentile([], 0.5) == 0.0


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_covers_the_share(
    values: list[float], share: float
) -> None:
    found = percentile(values, share)
    needed = math.ceil(share * len(values))
    assert found in values
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < needed


def test_gaps_are_milliseconds_between_arrivals() -> None:
    assert gaps_ms([1.0, 1.25, 1.25, 2.0]) == [250.0, 0.0, 750.0]
    assert gaps_ms([1.0]) == []


def test_a_stream_that_stalls_all_the_while_shows_its_stall() -> None:
    # Tokens at 1.0 and 9.0; the prompt prefills from 2.0 to 8.0.
    assert overlapping_gaps_ms([0.5, 1.0, 9.0, 9.5], begun=2.0, ended=8.0) == [8000.0]


def test_gaps_at_both_ends_count_and_those_outside_do_not() -> None:
    arrivals = [0.0, 1.0, 3.0, 4.0, 7.0, 8.0]
    assert overlapping_gaps_ms(arrivals, begun=2.0, ended=6.0) == [2000.0, 1000.0, 3000.0]


def test_lane_delta_subtracts_the_earlier_reading() -> None:
    def reading(scale: int, **num_bytes: int) -> pb.GetServerInfoResponse:
        lane = pb.LaneCounters(
            lane="decode",
            steps=scale,
            tokens=2 * scale,
            wall_s=0.5 * scale,
            compute_s=0.25 * scale,
            comm_s=0.125 * scale,
            exposed_comm_s=0.0625 * scale,
            bytes_sent=num_bytes,
            received_by_rank=[scale, 3 * scale],
        )
        return pb.GetServerInfoResponse(lanes=[pb.LaneCounters(lane="prefill", steps=99), lane])

    delta = lane_delta(reading(2, query=10), reading(10, query=30, partial=7), "decode")
    assert delta == {
        "steps": 8,
        "tokens": 16,
        "wall_s": 4.0,
        "compute_s": 2.0,
        "comm_s": 1.0,
        "exposed_comm_s": 0.5,
        "bytes_moved": 27,
        "bytes_by_kind": {"query": 20, "partial": 7},
        "received_by_rank": [8, 24],
    }


@pytest.mark.parametrize(("dtype", "element_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_decode_bytes_of_the_default_model(dtype: str, element_bytes: int) -> None:
    # 30 layers; to each of 3 other ranks 9 heads of 64: q there, o and 9 fp32 LSEs back.
    per_rank = 2 * 9 * 64 * element_bytes + 9 * 4
    assert decode_bytes_per_token(ServerFlags(DEFAULT_MODEL, 4, 1, dtype, 1)) == 30 * 3 * per_rank
    assert decode_bytes_per_token(ServerFlags(DEFAULT_MODEL, 1, 1, dtype, 1)) == 0


def test_random_prompts_repeat_by_seed_and_hold_no_special_token() -> None:
    ids = prompt_ids(DEFAULT_MODEL, 500, None, seed=3)
    assert ids == prompt_ids(DEFAULT_MODEL, 500, None, seed=3)
    assert ids != prompt_ids(DEFAULT_MODEL, 500, None, seed=4)
    assert min(ids) > 16  # SmolLM2's special tokens are 0 to 16


def test_text_prompts_are_cut_from_the_start_and_must_be_long_enough(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one two three four five")
    assert prompt_ids(DEFAULT_MODEL, 3, text, 0) == prompt_ids(DEFAULT_MODEL, 5, text, 0)[:3]
    with pytest.raises(ConfigError, match=r"^--text: .*text has 5 tokens, 6 are needed$"):
        prompt_ids(DEFAULT_MODEL, 6, text, 0)
    with pytest.raises(ConfigError, match=r"^--text: .*absent: No such file"):
        prompt_ids(DEFAULT_MODEL, 6, tmp_path / "absent", 0)
    text.write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"^--text: .*text: not UTF-8 at byte 3$"):
        prompt_ids(DEFAULT_MODEL, 6, text, 0)


def test_the_document_stands_before_the_question(tmp_path: Path) -> None:
    document = tmp_path / "report.txt"
    document.write_bytes("Größe\n".encode())
    assert read_prompt(document, "Why?", None) == "Größe\n\n\nWhy?"
    assert read_prompt(document, "", None) == "Größe\n"
    assert read_prompt(None, "Why?", None) == "Why?"


def test_standard_input_is_read_where_it_is_asked_for() -> None:
    assert read_prompt(None, "", io.BytesIO(b"piped")) == "piped"
    assert read_prompt(Path("-"), "Why?", io.BytesIO(b"piped")) == "piped\n\nWhy?"
    # A question alone is the whole prompt: an open pipe nobody writes to must not hang it.
    assert read_prompt(None, "Why?", io.BytesIO(b"piped")) == "Why?"


def test_prompt_errors_name_their_source(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\xffcd")
    with pytest.raises(ConfigError, match=r"bad\.txt: not UTF-8 at byte 2$"):
        read_prompt(bad, "", None)
    with pytest.raises(ConfigError, match=r"^standard input: not UTF-8 at byte 0$"):
        read_prompt(None, "", io.BytesIO(b"\xff"))
    with pytest.raises(ConfigError, match=r"^--file: .*absent: No such file"):
        read_prompt(tmp_path / "absent", "", None)
    with pytest.raises(ConfigError, match=r"^--prompt, --file: give one"):
        read_prompt(None, "", None)


def generate(prompt: str | Sequence[int], sampling: SamplingParams) -> None:
    async def run() -> None:
        async with GenerationClient(NOWHERE) as client:
            async for _ in client.generate(prompt, sampling):
                pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ("a", SamplingParams(max_tokens=2**40)),
        ("a", SamplingParams(seed=2**70)),
        ("\udcff", SamplingParams()),
        ([-1], SamplingParams()),
    ],
)
def test_what_fits_no_message_is_an_invalid_request(
    prompt: str | list[int], sampling: SamplingParams
) -> None:
    with pytest.raises(InvalidRequestError, match=r"^request: cannot be sent: "):
        generate(prompt, sampling)


def test_no_server_is_an_error_that_names_the_target() -> None:
    with pytest.raises(
        ServerError, match=f"^UNAVAILABLE: no server answers at {NOWHERE}"
    ) as raised:
        generate("a", SamplingParams())
    assert raised.value.status == "UNAVAILABLE"


def test_a_record_says_how_and_where_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    record.check_writable(path)
    record.write(path, "prefill", {"seed": 1}, [{"ttft_s": 1.5}])
    written = json.loads(path.read_text())
    assert written["bench"] == "prefill"
    assert written["parameters"] == {"seed": 1}
    assert written["results"] == [{"ttft_s": 1.5}]
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["torch"] != "not installed"
    assert written["command"].split()[0] == "csps"
    assert written["commit"]
    assert written["date"].endswith("+00:00")


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path, "decode", {}, {"round": 1})
    with path.open() as reader:
        record.write(path, "decode", {}, {"round": 2})
        assert json.load(reader)["results"] == {"round": 1}
    assert json.loads(path.read_text())["results"] == {"round": 2}
    assert [*tmp_path.iterdir()] == [path]


def test_an_unwritable_record_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--json: .*Is a directory$"):
        record.check_writable(tmp_path)
