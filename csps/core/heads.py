"""Which attention heads a rank has: pure arithmetic, for any numbers of heads and ranks."""

from itertools import pairwise
from typing import NamedTuple


class HeadPart(NamedTuple):
    """KV heads [first, stop) of a model and, of each one's group of query heads, a range.

    Only a part of one KV head may have less than the whole group: there are then more ranks
    than KV heads, and those that share a KV head each keep its K and V. A part may be empty.
    """

    first: int
    stop: int
    group_first: int
    group_stop: int

    @property
    def num_kv_heads(self) -> int:
        return self.stop - self.first

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.group_stop - self.group_first

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def num_qkv_heads(self) -> int:
        """Query heads, and KV heads once for keys and once for values."""
        return self.num_heads + 2 * self.num_kv_heads

    def split(self, num_parts: int) -> list["HeadPart"]:
        """Cut into `num_parts` parts of nearly equal size, in order of heads.

        By KV head while there are enough of them; else each KV head is given to neighbouring
        parts, which share its query heads. Splitting by a and then by b gives the same parts as
        splitting by a * b where the KV heads divide evenly, and never loses a head elsewhere.
        """
        count = self.num_kv_heads
        if count >= num_parts:
            bounds = [self.first + part * count // num_parts for part in range(num_parts + 1)]
            return [self._replace(first=first, stop=stop) for first, stop in pairwise(bounds)]
        owners = [self.first + part * count // num_parts for part in range(num_parts)]
        return [self._share(owners, part) for part in range(num_parts)]

    def _share(self, owners: list[int], part: int) -> "HeadPart":
        """The share of `part` in its KV head, which `owners` gives to several parts."""
        if self.num_kv_heads == 0:
            return self
        head = owners[part]
        sharers = owners.count(head)
        index = part - owners.index(head)
        first = self.group_first + index * self.group_size // sharers
        stop = self.group_first + (index + 1) * self.group_size // sharers
        if first == stop:
            return HeadPart(head, head, first, first)
        return HeadPart(head, head + 1, first, stop)


def all_heads(num_heads: int, num_kv_heads: int) -> HeadPart:
    """Every head of a model."""
    return HeadPart(0, num_kv_heads, 0, num_heads // num_kv_heads)


class AxisHeads(NamedTuple):
    """Heads of the ranks of one sequence axis: `parts[s]` of `resident`, whose weights all hold."""

    resident: HeadPart
    parts: tuple[HeadPart, ...]

    def queries(self, rank: int) -> slice:
        """Query heads of a rank among those of `resident`."""
        part, resident = self.parts[rank], self.resident
        first = (part.first - resident.first) * resident.group_size
        first += part.group_first - resident.group_first
        return slice(first, first + part.num_heads)

    def keys(self, rank: int) -> slice:
        """KV heads of a rank among those of `resident`; ranks may share one."""
        part, first = self.parts[rank], self.resident.first
        return slice(part.first - first, part.stop - first)
