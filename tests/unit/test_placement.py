"""sched/placement.py and sched/sequence.py: the choices and counters by themselves."""

from dataclasses import replace

import pytest

from csps.core.plan import Lane
from csps.core.request import FinishReason, SamplingParams
from csps.core.shards import Slice
from csps.sched.placement import choose_growth_rank, choose_whole_rank, fits_kv, split_stages
from csps.sched.sequence import Sequence
from tests.unit.scheduling import CONFIG


@pytest.mark.parametrize(
    ("ranks", "blocks", "free", "masters", "stay_whole", "want"),
    [
        ((0, 1), (3, 0), (1, 9), (9, 0), True, 0),
        ((0, 1), (3, 0), (0, 9), (0, 0), True, 1),
        ((0, 1), (3, 0), (1, 9), (0, 0), False, 1),
        ((0, 1, 2), (3, 2, 0), (1, 9, 9), (0, 0, 0), True, 1),
        ((0, 1), (3, 3), (1, 9), (0, 1), False, 0),
        ((0, 1), (3, 3), (1, 9), (1, 1), False, 1),
        ((0, 1), (3, 4), (0, 1), (0, 9), False, 1),
        ((0, 1), (3, 4), (0, 0), (0, 0), False, None),
        ((1, 2), (3, 0, 0), (9, 1, 2), (0, 0, 0), True, 2),
        ((1, 2), (3, 0, 1), (9, 9, 1), (0, 0, 0), True, 2),
        ((1,), (3, 0, 0), (9, 0, 9), (0, 0, 0), False, None),
    ],
    ids=[
        "stay",
        "no page",
        "long",
        "few holders",
        "masters",
        "most free",
        "any",
        "none",
        "leave a prefill rank",
        "stay on the decode rank",
        "no page on a decode rank",
    ],
)
def test_growth_rank(
    ranks: tuple[int, ...],
    blocks: tuple[int, ...],
    free: tuple[int, ...],
    masters: tuple[int, ...],
    stay_whole: bool,
    want: int | None,
) -> None:
    assert choose_growth_rank(ranks, blocks, free, masters, stay_whole=stay_whole) == want


def test_whole_rank_is_the_least_loaded_then_the_freest_with_room() -> None:
    none = (0, 0, 0)
    assert choose_whole_rank((0, 1), none, (9, 5, 1), (4, 0, 0)) == 1
    assert choose_whole_rank((0, 1, 2), none, (3, 5, 4), none) == 1
    assert choose_whole_rank((), none, (9, 5, 1), (4, 0, 0)) is None


def test_whole_rank_is_the_one_that_has_most_of_the_prefix() -> None:
    assert choose_whole_rank((0, 1, 2), (1, 2, 2), (9, 1, 1), (0, 5, 4)) == 2
    assert choose_whole_rank((0,), (1, 2, 2), (1, 9, 9), (5, 0, 0)) == 0


def test_split_stages_name_the_prefill_ranks() -> None:
    config = replace(CONFIG, num_ranks=4, prefill_ranks=(3, 1), stage_tokens=16)
    assert split_stages(0, 30, config) == (
        (Slice(3, 0, 4), Slice(1, 4, 8), Slice(1, 8, 12), Slice(3, 12, 16)),
        (Slice(3, 16, 20), Slice(1, 20, 24), Slice(1, 24, 28), Slice(3, 28, 30)),
    )


def test_kv_of_a_sequence_is_what_prefill_ranks_hold() -> None:
    config = replace(CONFIG, num_ranks=4, prefill_ranks=(3, 1))
    assert config.kv_tokens == 2 * 32 * 4
    assert fits_kv(256, config)
    assert not fits_kv(257, config)
    assert config.ranks(Lane.DECODE) == (0, 1, 2, 3)


@pytest.mark.parametrize("ranks", [(0, 2), (-1,), (0, 0)])
def test_dedicated_ranks_exist_once(ranks: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="decode_ranks"):
        replace(CONFIG, decode_ranks=ranks)


def sequence(**sampling: int | bool | tuple[int, ...]) -> Sequence:
    return Sequence(0, (4, 5, 6), SamplingParams(**sampling), eos_ids=frozenset({999}))


def test_stop_tokens_and_min_tokens() -> None:
    seq = sequence(max_tokens=5, min_tokens=2, stop_token_ids=(50,))
    assert seq.append(50) is None
    assert seq.append(1) is None
    assert seq.append(50) is FinishReason.STOP
    assert sequence().append(999) is FinishReason.STOP
    assert sequence(ignore_eos=True).append(999) is None
    assert sequence(max_tokens=1).append(999) is FinishReason.STOP
    assert sequence(max_tokens=1).append(1) is FinishReason.LENGTH


def test_tokens_across_prompt_and_output() -> None:
    seq = sequence()
    for token_id in (7, 8):
        seq.append(token_id)
    assert seq.num_tokens == 5
    assert [*seq.token_ids(0, 5)] == [4, 5, 6, 7, 8]
    assert [*seq.token_ids(2, 4)] == [6, 7]
    assert [*seq.token_ids(4, 5)] == [8]


def test_restart_owes_only_the_rest_of_min_tokens() -> None:
    seq = sequence(min_tokens=2, temperature=0.5)
    assert seq.sampling_from_here() is seq.sampling
    seq.append(7)
    assert seq.sampling_from_here() == SamplingParams(min_tokens=1, temperature=0.5)
    seq.append(7)
    seq.append(7)
    assert seq.sampling_from_here().min_tokens == 0
