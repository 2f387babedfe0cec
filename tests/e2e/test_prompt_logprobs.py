"""Log-probabilities of the prompt, as a client sees them."""

import grpc
import pytest

from tests.e2e.harness import Running, prompt, request


@pytest.mark.parametrize("num_tokens", [20, 300, 1300])
def test_they_are_those_of_drawing_the_same_tokens(two_ranks: Running, num_tokens: int) -> None:
    """A greedy answer's own log-probabilities, against those of it as the end of a prompt."""
    ids = prompt(num_tokens)
    drawn = two_ranks.generate(request(ids, max_tokens=30, ignore_eos=True, logprobs=0))
    scored = two_ranks.generate(
        request(ids + drawn.token_ids, max_tokens=1, ignore_eos=True, prompt_logprobs=30)
    )
    expected = [entry.logprob for entry in drawn.logprobs]
    assert scored.complete.prompt_logprobs == pytest.approx(expected, abs=1e-4)
    assert not drawn.complete.prompt_logprobs


def test_as_many_as_there_are_and_none_at_all(two_ranks: Running) -> None:
    ids = prompt(700)
    every = two_ranks.generate(request(ids, max_tokens=1, prompt_logprobs=699)).complete
    assert len(every.prompt_logprobs) == 699
    assert max(every.prompt_logprobs) < 0.0
    last = two_ranks.generate(request(ids, max_tokens=1, prompt_logprobs=1)).complete
    assert last.prompt_logprobs == pytest.approx(every.prompt_logprobs[-1:], abs=1e-4)
    none = two_ranks.generate(request(ids, max_tokens=1)).complete
    assert not none.prompt_logprobs


def test_the_first_token_has_none(two_ranks: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        two_ranks.generate(request(prompt(20), prompt_logprobs=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_logprobs: must be less than the prompt's 20 tokens" in caught.value.details()
