"""One rank of the engine as a server runs it, lanes and all, and plans as a scheduler makes them.

What the coordinator and its control traffic take is not in it.
"""

import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from csps.core.attention import AttentionParams
from csps.core.config import WorkerSetup
from csps.core.plan import Lane, StepPlan, StepResult, Work
from csps.core.request import SamplingParams
from csps.core.shards import Extent, Slice, num_blocks, prefill_stages
from csps.parallel.mesh import Mesh
from csps.worker.build import Built
from csps.worker.lanes import LaneThread
from csps.worker.place import Place, connect_ranks

STEP_TIMEOUT_S = 120.0
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)

Build = Callable[[WorkerSetup, Place, Mesh], Built]


class Rank:
    """The only rank of a server. Plans of all lanes are run one at a time."""

    def __init__(self, built: Built, setup: WorkerSetup) -> None:
        self.built, self.setup = built, setup
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._lanes = {
            lane: LaneThread(
                lane,
                built.runner,
                num_threads=torch.get_num_threads(),
                report=self._results.put,
                fail=self._results.put,
            )
            for lane in (Lane.PREFILL, Lane.DECODE)
        }
        self._steps = dict.fromkeys(self._lanes, 0)
        self._next_page = self._next_id = 0
        self._failure: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a step raised: it runs no more."""
        return self._failure is not None

    @property
    def num_tokens(self) -> int:
        """Room for KV."""
        return self.built.num_pages * self.setup.block_size

    def run(self, lane: Lane, work: Sequence[Work]) -> StepResult:
        """One step; raises what the lane raised, and then again, since it has ended."""
        if self._failure is not None:
            raise RuntimeError("a lane has ended") from self._failure
        plan = StepPlan(lane, self._steps[lane], tuple(work))
        self._steps[lane] += 1
        self._lanes[lane].put(plan)
        result = self._results.get(timeout=STEP_TIMEOUT_S)
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        return result

    def prefill(
        self, token_ids: Sequence[int], attention: AttentionParams, room: int
    ) -> tuple["Running", list[StepResult]]:
        """Run a prompt's stages; there is room for `room` tokens behind it."""
        seq_id, extent = self._place(len(token_ids) + room)
        size, stage = self.setup.block_size, self.setup.step_tokens
        results = []
        for start, stop in prefill_stages(len(token_ids), 1, size, stage):
            first, last = start == 0, stop == len(token_ids)
            work = Work(
                seq_id=seq_id,
                start=start,
                token_ids=tuple(token_ids[start:stop]),
                slices=(Slice(0, start, stop),),
                new_extents=(extent,) if first else (),
                sample=last,
                sampling=GREEDY if first else None,
                attention=attention,
            )
            results.append(self.run(Lane.PREFILL, [work]))
        (token,) = results[-1].sampled
        return Running(seq_id, len(token_ids), token.token_id), results

    def with_context(self, num_tokens: int, room: int) -> "Running":
        """A sequence whose KV is whatever is in the pool, as if it had been prefilled."""
        seq_id, extent = self._place(num_tokens + room)
        return Running(seq_id, num_tokens, token_id=1, new_extents=(extent,), sampling=GREEDY)

    def decode(self, running: Sequence["Running"]) -> tuple[StepResult, float]:
        """One token of each; seconds from the plan to the tokens, as the coordinator sees it."""
        work = [sequence.next_work() for sequence in running]
        begun = time.perf_counter()
        result = self.run(Lane.DECODE, work)
        seconds = time.perf_counter() - begun
        drawn = {token.seq_id: token.token_id for token in result.sampled}
        for sequence in running:
            sequence.token_id = drawn[sequence.seq_id]
        return result, seconds

    def release_all(self) -> None:
        """Forget every sequence and give back its pages."""
        self.built.runner.release(list(range(self._next_id)))
        self._next_page = 0

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    def _place(self, num_tokens: int) -> tuple[int, Extent]:
        pages = num_blocks(num_tokens, self.setup.block_size)
        if self._next_page + pages > self.built.num_pages:
            raise MemoryError(f"{pages} pages are wanted, {self.built.num_pages} are there")
        seq_id, extent = self._next_id, Extent(0, self._next_page, pages)
        self._next_id += 1
        self._next_page += pages
        return seq_id, extent


@dataclass(slots=True)
class Running:
    """A sequence that decodes: `token_id` is its last one, at `position`, without KV yet."""

    seq_id: int
    position: int
    token_id: int
    new_extents: tuple[Extent, ...] = ()
    sampling: SamplingParams | None = None

    def next_work(self) -> Work:
        """The next step's part of it; counts it as done."""
        work = Work(
            seq_id=self.seq_id,
            start=self.position,
            token_ids=(self.token_id,),
            slices=(Slice(0, self.position, self.position + 1),),
            new_extents=self.new_extents,
            sample=True,
            sampling=self.sampling,
        )
        self.position += 1
        self.new_extents, self.sampling = (), None
        return work


@contextmanager
def serving(setup: WorkerSetup, device: torch.device, build: Build) -> Iterator[Rank]:
    """A rank that `build` built, ready for plans; everything is given back behind it."""
    with tempfile.TemporaryDirectory() as directory:
        place = Place(0, 1, 0, 1, f"file://{Path(directory) / 'store'}")
        mesh = connect_ranks(setup, place, device)
        try:
            rank = Rank(build(setup, place, mesh), setup)
            try:
                yield rank
            finally:
                rank.close()
        finally:
            dist.destroy_process_group()
