"""Free pages of one rank, kept as runs so that sequences get contiguous pages."""

from bisect import bisect_left, insort
from typing import NamedTuple


class PageRun(NamedTuple):
    """Pages [first, first + num) of one rank."""

    first: int
    num: int

    @property
    def stop(self) -> int:
        return self.first + self.num


class PageAllocator:
    """Hands out pages [0, num_pages), as few runs as possible.

    A shard in one run lets attention read its KV as a view, without a gather copy.
    """

    # Ownership: a page inside a run listed here is free; any other page belongs to whoever
    # was handed it. Runs are maximal: two free runs never touch.

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._firsts = [0] if num_pages else []  # sorted
        self._num_at = {0: num_pages} if num_pages else {}

    def free_runs(self) -> list[PageRun]:
        """Maximal free runs in page order."""
        return [PageRun(first, self._num_at[first]) for first in self._firsts]

    def allocate(self, num: int) -> tuple[PageRun, ...]:
        """Take `num` pages: the first run that holds them all, else as few runs as possible.

        Runs are returned in page order. The caller has checked `num_free`.
        """
        assert 0 < num <= self.num_free, (num, self.num_free)
        for first in self._firsts:
            if self._num_at[first] >= num:
                return (self._take(first, num),)
        taken = []
        left = num
        # Longest first gives the fewest fragments.
        for run in sorted(self.free_runs(), key=lambda run: (-run.num, run.first)):
            taken.append(self._take(run.first, min(run.num, left)))
            left -= taken[-1].num
            if left == 0:
                break
        return tuple(sorted(taken))

    def allocate_after(self, page: int) -> int:
        """Take one page for the owner of `page`: the next one if it is free, else any."""
        # `page` is not free, so a free page + 1 can only be where a run begins.
        if page + 1 in self._num_at:
            return self._take(page + 1, 1).first
        return self.allocate(1)[0].first

    def free(self, run: PageRun) -> None:
        """Take `run` back. A page that is free already is an AssertionError."""
        assert 0 <= run.first < run.stop <= self.num_pages, f"{run} is not a run of this rank"
        at = bisect_left(self._firsts, run.first)
        after = self._firsts[at] if at < len(self._firsts) else None
        before = self._firsts[at - 1] if at > 0 else None
        assert after is None or run.stop <= after, f"double free: {run} meets free page {after}"
        first, num = run
        if before is not None:
            end = before + self._num_at[before]
            assert end <= run.first, f"double free: {run} meets free page {end - 1}"
            if end == run.first:
                first, num = before, num + self._num_at[before]
        if after is not None and after == run.stop:
            num += self._num_at.pop(after)
            del self._firsts[at]
        if first == run.first:
            insort(self._firsts, first)
        self._num_at[first] = num
        self.num_free += run.num

    def _take(self, first: int, num: int) -> PageRun:
        """Cut the first `num` pages off the free run that begins at `first`."""
        at = bisect_left(self._firsts, first)
        left = self._num_at.pop(first) - num
        if left:
            self._firsts[at] = first + num
            self._num_at[first + num] = left
        else:
            del self._firsts[at]
        self.num_free -= num
        return PageRun(first, num)
