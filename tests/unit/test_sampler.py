"""Drawing tokens: repeatable, truncated as asked, stop tokens masked while too early."""

import math

import torch

from csps.core.request import SamplingParams
from csps.engine.sampler import Draw, sample


def draw(position: int = 5, num_drawn: int = 0, eos: tuple[int, ...] = (), **params) -> Draw:
    return Draw(1, SamplingParams(**params), position, num_drawn, frozenset(eos))


def test_greedy_and_its_logprobs() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = sample(logits, [draw(logprobs=2), draw()])
    assert (first.token_id, second.token_id) == (1, 0)
    assert first.top_ids == (1, 2)
    assert first.logprob == first.top_logprobs[0]
    assert math.isclose(first.logprob, float(torch.log_softmax(logits[0], -1)[1]), rel_tol=1e-6)
    assert second.logprob is None


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(1, 500)
    alone = sample(logits, [draw(temperature=1.0, seed=7)])[0].token_id
    batch = torch.cat((torch.randn(3, 500), logits))
    others = [draw(temperature=1.0, seed=s) for s in (1, 2, 3)]
    assert sample(batch, [*others, draw(temperature=1.0, seed=7)])[3].token_id == alone
    ids = {sample(logits, [draw(p, temperature=1.0, seed=7)])[0].token_id for p in range(40)}
    assert len(ids) > 10


def test_rows_of_all_kinds_are_what_each_is_alone() -> None:
    """Greedy and drawn, cut by top_k and top_p, with and without log-probabilities."""
    # Of few values: in ties too.
    logits = torch.randint(0, 40, (8, 300), generator=torch.Generator().manual_seed(0)) / 8
    draws = [
        draw(),
        draw(logprobs=3),
        draw(temperature=0.7, seed=1),
        draw(temperature=1.5, seed=2, top_k=20, logprobs=0),
        draw(temperature=1.0, seed=3, top_k=20, top_p=0.8),
        draw(temperature=1.0, seed=4, top_p=0.3, logprobs=3),
        draw(logprobs=20, min_tokens=3, stop_token_ids=(int(logits[6].argmax()),)),
        draw(temperature=0.7, seed=5, top_k=1),
    ]
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], [d])[0] for i, d in enumerate(draws)]
    assert [len(token.top_ids) for token in together] == [0, 3, 0, 0, 0, 3, 20, 0]
    # A stop token that came too early is passed over, but stands among the likeliest.
    assert together[6].token_id != together[6].top_ids[0] == int(logits[6].argmax())


def test_truncation() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    for position in range(60):
        assert sample(logits, [draw(position, temperature=1.0, seed=1, top_k=1)])[0].token_id == 0
        top_k = sample(logits, [draw(position, temperature=1.0, seed=1, top_k=2)])[0].token_id
        assert top_k in (0, 1)
        top_p = sample(logits, [draw(position, temperature=1.0, seed=1, top_p=0.7)])[0].token_id
        assert top_p in (0, 1)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    drawn = [sample(logits, [draw(p, temperature=1.0, seed=3)])[0].token_id for p in range(3000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.04, rtol=0)


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.0]])
    early = draw(num_drawn=1, eos=(1,), min_tokens=2, stop_token_ids=(2,))
    assert sample(logits, [early])[0].token_id == 0
    late = draw(num_drawn=2, eos=(1,), min_tokens=2, stop_token_ids=(2,))
    assert sample(logits, [late])[0].token_id == 1
