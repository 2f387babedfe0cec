"""Named transfers of one lane. Every byte that leaves a rank is counted here, by kind."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from csps.core.plan import Lane
from csps.parallel.mesh import Mesh
from csps.parallel.overlap import (
    CommClock,
    CommThread,
    Handle,
    InlineHandle,
    NothingToWaitFor,
    ThreadHandle,
    mark,
)
from csps.parallel.staged import StagedHandle, to_host


class SequenceComm:
    """Traffic of one lane between the ranks of the sequence axis.

    A rank may be alone (size 1): then nothing is ever sent. Tensors must be contiguous.
    """

    def __init__(self, mesh: Mesh, lane: Lane, clock: CommClock) -> None:
        self.rank = mesh.s
        self.size = mesh.sp
        self._group = mesh.lanes[lane].sequence
        self._clock = clock
        self._device = mesh.device
        self._staged = mesh.staged
        self._by_gloo = mesh.staged or mesh.device.type == "cpu"
        # A lane's own thread: made lazily by the executor, so it inherits that lane's priority.
        self._thread = CommThread(f"{lane}-comm") if self._by_gloo else None

    def ring_shift(self, kind: str, outgoing: Tensor, incoming: Tensor) -> Handle:
        """Send `outgoing` to the next rank and fill `incoming` from the one before.

        Runs beside the caller's computation. Sizes may differ from rank to rank but must
        be known to both ends.
        """
        following = (self.rank + 1) % self.size
        preceding = (self.rank - 1) % self.size
        return self._post(kind, {following: outgoing}, {preceding: incoming}, self._thread)

    def exchange(
        self, kind: str, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]
    ) -> Handle:
        """Send and receive one message per peer named, and none to the others.

        Point to point: messages of a decode step are a few KB, and a rank that shares no
        sequence with a peer must not pay for it. Posted from the caller's thread.
        """
        return self._post(kind, outgoing, incoming, None)

    def post(
        self,
        outgoing: Mapping[int, Tensor],
        incoming: Mapping[int, Tensor],
        sent: Mapping[int, Sequence[tuple[str, int]]],
        received: Mapping[int, Sequence[tuple[str, int]]],
    ) -> Handle:
        """As `exchange`, beside the caller's computation, bytes counted as (kind, bytes) say."""
        for counter, messages in (
            (self._clock.bytes_sent, sent),
            (self._clock.bytes_received, received),
        ):
            for kind, num_bytes in (part for parts in messages.values() for part in parts):
                counter[kind] += num_bytes
        return self._begin(_messages(outgoing), _messages(incoming), self._thread)

    def _post(
        self,
        kind: str,
        outgoing: Mapping[int, Tensor],
        incoming: Mapping[int, Tensor],
        thread: CommThread | None,
    ) -> Handle:
        sends, receives = _messages(outgoing), _messages(incoming)
        for message in sends.values():
            self._clock.bytes_sent[kind] += message.numel()
        for message in receives.values():
            self._clock.bytes_received[kind] += message.numel()
        return self._begin(sends, receives, thread)

    def _begin(
        self, sends: dict[int, Tensor], receives: dict[int, Tensor], thread: CommThread | None
    ) -> Handle:
        if not sends and not receives:
            return NothingToWaitFor()
        if self._staged:
            return self._begin_staged(sends, receives)
        if thread is not None:
            future = thread.submit(lambda: self._start(sends, receives))
            return ThreadHandle(future, self._clock)
        return InlineHandle(self._start(sends, receives), self._clock, self._device)

    def _begin_staged(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> Handle:
        # All in the thread: it ends also what nobody waits for, such as a send without an answer.
        assert self._thread is not None
        outgoing = {peer: to_host(message, self._clock) for peer, message in sends.items()}
        incoming = {peer: torch.empty_like(m, device="cpu") for peer, m in receives.items()}
        future = self._thread.submit(lambda: self._start(outgoing, incoming))
        arrivals = [(message, incoming[peer]) for peer, message in receives.items()]
        return StagedHandle(future.result, arrivals, self._clock, self._device)

    def _start(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> list[dist.Work]:
        group = self._group
        if self._by_gloo:
            # The group's own calls: torch.distributed's checks around them cost twice the
            # latency of the message, and decode sends two messages per layer.
            return [
                *(group.recv([message], peer, 0) for peer, message in receives.items()),
                *(group.send([message], peer, 0) for peer, message in sends.items()),
            ]
        ops = [
            *(dist.P2POp(dist.irecv, m, group=group, group_peer=p) for p, m in receives.items()),
            *(dist.P2POp(dist.isend, m, group=group, group_peer=p) for p, m in sends.items()),
        ]
        # Fused: NCCL would run them one after the other, and two ranks that both send first wait.
        return dist.batch_isend_irecv(ops) if ops else []

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()


def _messages(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {peer: _as_bytes(tensor) for peer, tensor in tensors.items() if tensor.numel()}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class TensorComm:
    """Traffic of one lane between ranks that share tokens and split the weights.

    `group` None: the rank is alone. `rank` and `size` are its place in the group. `staged`: as
    the mesh's.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        clock: CommClock,
        *,
        staged: bool,
    ) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._clock = clock
        self._staged = staged

    def all_reduce(self, partial: Tensor) -> Handle:
        """Begin to sum `partial` over the ranks, in place; beside the caller's computation.

        Bytes are those of a ring all-reduce: 2 (size - 1) / size of the tensor.
        """
        if self._group is None or not partial.numel():
            return NothingToWaitFor()
        moved = 2 * (self.size - 1) * partial.numel() * partial.element_size() // self.size
        self._clock.bytes_sent["hidden"] += moved
        self._clock.bytes_received["hidden"] += moved
        summed = to_host(partial, self._clock) if self._staged else partial
        work = dist.all_reduce(summed, group=self._group, async_op=True)
        if self._staged:
            return StagedHandle(work.wait, [(partial, summed)], self._clock, partial.device)
        return InlineHandle([work], self._clock, partial.device)

    def sum_numbers(self, kind: str, numbers_N: Tensor) -> None:
        """Sum a few int64 over the ranks, in place."""
        if self._group is None:
            return
        begun = mark(numbers_N.device)
        summed_N = to_host(numbers_N, self._clock) if self._staged else numbers_N
        dist.all_reduce(summed_N, group=self._group)
        if self._staged:
            numbers_N.copy_(summed_N)
        self._clock.waited(begun, begun, mark(numbers_N.device))
        moved = 2 * (self.size - 1) * numbers_N.numel() * numbers_N.element_size() // self.size
        self._clock.bytes_sent[kind] += moved
        self._clock.bytes_received[kind] += moved

    def gather_columns(self, part_NV: Tensor) -> Tensor | None:
        """Parts of equal width side by side, in rank order, on rank 0; None on the others."""
        if self._group is None:
            return part_NV
        device = part_NV.device
        part_NV = to_host(part_NV, self._clock) if self._staged else part_NV
        begun = mark(device)
        is_root = self.rank == 0
        parts = [torch.empty_like(part_NV) for _ in range(self.size)] if is_root else []
        dist.gather(part_NV, parts or None, group=self._group, group_dst=0)
        parts = [part.to(device) for part in parts]
        self._clock.waited(begun, begun, mark(device))
        size = part_NV.numel() * part_NV.element_size()
        self._clock.bytes_sent["logits"] += 0 if is_root else size
        self._clock.bytes_received["logits"] += (self.size - 1) * size if is_root else 0
        return torch.cat(parts, dim=1) if is_root else None
