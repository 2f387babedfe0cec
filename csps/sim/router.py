"""Which replica a request goes to."""

import random
from collections.abc import Sequence

from csps.sim.replica import Replica
from csps.trace.schema import TraceRequest


class Router:
    """A session stays where its prefix is, unless waiting there costs more than computing it.

    That is so when more tokens are queued there, beyond those of the least loaded replica, than
    the prompt has. Sessions that are new, or that move, go to the replica with the fewest queued
    prompt tokens, of those to the one with the fewest requests, then to any (`seed`).
    """

    def __init__(self, replicas: Sequence[Replica], seed: int) -> None:
        self._replicas = replicas
        self._random = random.Random(seed)
        self._home: dict[int, Replica] = {}

    def choose(self, request: TraceRequest) -> Replica:
        if len(self._replicas) == 1:
            return self._replicas[0]
        least = min(_load(replica) for replica in self._replicas)
        chosen = self._home.get(request.session)
        if chosen is None or chosen.queued_tokens - least[0] > request.prompt_tokens:
            equal = [replica for replica in self._replicas if _load(replica) == least]
            chosen = self._random.choice(equal)
        self._home[request.session] = chosen
        return chosen


def _load(replica: Replica) -> tuple[int, int]:
    return replica.queued_tokens, replica.num_live
