"""Pages, and the free ones of a rank: kept as runs so that sequences get contiguous pages."""

from bisect import bisect_left
from typing import NamedTuple


class Page(NamedTuple):
    """One page of one rank."""

    rank: int
    number: int


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

    def find(self, num: int, after: int = -1) -> list[PageRun]:
        """Where `num` pages are to be had: those that follow page `after`, if all are free; else
        the first run that holds them all, else as few runs as possible.

        Runs are returned in page order. `after` is a page of the same owner, or -1. The caller
        has checked `num_free`.
        """
        # `after` is not free, so free pages behind it can only be where a run begins.
        if self._num_at.get(after + 1, 0) >= num > 0:
            return [PageRun(after + 1, num)]
        return self._best(num)

    def take(self, runs: list[PageRun]) -> None:
        """Hand out what `find` has just returned."""
        for first, num in runs:
            self._take(first, num)

    def free(self, run: PageRun) -> PageRun:
        """Take `run` back; the free run it is part of then.

        A page that is free already is an AssertionError.
        """
        firsts, num_at = self._firsts, self._num_at
        first, num = run
        stop = first + num
        assert 0 <= first < stop <= self.num_pages, f"{run} is not a run of this rank"
        at = bisect_left(firsts, first)
        after = firsts[at] if at < len(firsts) else self.num_pages
        before = firsts[at - 1] if at > 0 else 0
        end = before + num_at[before] if at > 0 else -1
        assert stop <= after, f"double free: {run} meets free page {after}"
        assert end <= first, f"double free: {run} meets free page {end - 1}"
        self.num_free += num
        if at < len(firsts) and stop == after:
            num += num_at.pop(after)
            del firsts[at]
        if end == first:
            num_at[before] += num
            return PageRun(before, num_at[before])
        firsts.insert(at, first)
        num_at[first] = num
        return PageRun(first, num)

    def _best(self, num: int) -> list[PageRun]:
        """Beginnings of free runs, in page order, that make `num` pages."""
        assert 0 < num <= self.num_free, (num, self.num_free)
        for first in self._firsts:
            if self._num_at[first] >= num:
                return [PageRun(first, num)]
        best = []
        left = num
        # Longest first gives the fewest fragments.
        for run in sorted(self.free_runs(), key=lambda run: (-run.num, run.first)):
            best.append(PageRun(run.first, min(run.num, left)))
            left -= best[-1].num
            if left == 0:
                break
        return sorted(best)

    def _take(self, first: int, num: int) -> None:
        """Cut the first `num` pages off the free run that begins at `first`."""
        at = bisect_left(self._firsts, first)
        left = self._num_at.pop(first) - num
        if left:
            self._firsts[at] = first + num
            self._num_at[first + num] = left
        else:
            del self._firsts[at]
        self.num_free -= num
