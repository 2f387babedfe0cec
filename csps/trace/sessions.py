"""Sessions of a trace that does not name them, read off the blocks its requests share."""

from collections import Counter
from collections.abc import Sequence

# A system prompt is no sign of a session. Blocks count as one if they lead more than half of all
# requests, and at least so many that no single conversation would explain it.
SYSTEM_PROMPT_REQUESTS = 64


def derive_sessions(blocks: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(session, turn) of requests given by their blocks, in order of arrival.

    A request follows the latest one that holds the last of its leading blocks already seen: it
    joins that one's session, one turn later. Any other request begins a session, named by its
    index, at turn 1.
    """
    uses = Counter(block for request in blocks for block in request)
    least = max(SYSTEM_PROMPT_REQUESTS, len(blocks) / 2)
    system = {block for block, num_requests in uses.items() if num_requests > least}
    latest: dict[int, int] = {}  # block -> index of the last request that holds it
    found: list[tuple[int, int]] = []
    for index, request in enumerate(blocks):
        parent = None
        for block in request:
            if block not in latest:
                break
            if block not in system:
                parent = latest[block]
        if parent is None:
            found.append((index, 1))
        else:
            session, turn = found[parent]
            found.append((session, turn + 1))
        latest.update(dict.fromkeys(request, index))
    return found
