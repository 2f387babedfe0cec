"""Pages, and the free ones of a rank: kept as runs so that sequences get contiguous pages."""

from bisect import bisect_left, insort
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

    def num_runs(self, num: int) -> int:
        """Runs that `num` pages would come in. The caller has checked `num_free`."""
        return len(self._best(num))

    def allocate(self, num: int, after: int = -1) -> tuple[PageRun, ...]:
        """Take `num` pages: those that follow page `after`, if all are free; else the first
        run that holds them all, else as few runs as possible.

        Runs are returned in page order. `after` is a page of the same owner, or -1. The caller
        has checked `num_free`.
        """
        # `after` is not free, so free pages behind it can only be where a run begins.
        if self._num_at.get(after + 1, 0) >= num > 0:
            return (self._take(after + 1, num),)
        return tuple(self._take(first, num) for first, num in self._best(num))

    def free(self, run: PageRun) -> PageRun:
        """Take `run` back; the free run it is part of then.

        A page that is free already is an AssertionError.
        """
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
