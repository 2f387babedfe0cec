"""Packed messages: what one rank has for another in one phase is one message, whatever it holds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csps.parallel.collectives import SequenceComm
from csps.parallel.overlap import Handle

# Any dtype can be viewed at such an offset.
ALIGNMENT = 16


class Part(NamedTuple):
    """One tensor of a message; `kind` is what its bytes are counted as."""

    kind: str
    tensor: Tensor


class Slot(NamedTuple):
    """What a part that is to come looks like; both ends must know it."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Arrival:
    """Messages under way; `wait` gives the parts of each peer's, as views of what came."""

    def __init__(
        self, handle: Handle, buffers: dict[int, Tensor], slots: Mapping[int, Sequence[Slot]]
    ) -> None:
        self._handle: Handle | None = handle
        self._buffers = buffers
        self._slots = slots

    def wait(self) -> dict[int, list[Tensor]]:
        """Parts by peer, in order. May be called again."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = None
        return {peer: _unpack(self._buffers[peer], slots) for peer, slots in self._slots.items()}


class Packets:
    """Exchanges of packed messages over the sequence axis.

    `eager`: every exchange is waited for where it is posted, so nothing overlaps.
    """

    def __init__(self, comm: SequenceComm, *, eager: bool) -> None:
        self.rank = comm.rank
        self.size = comm.size
        self._comm = comm
        self._eager = eager

    def post(
        self,
        outgoing: Mapping[int, Sequence[Part]],
        incoming: Mapping[int, Sequence[Slot]],
        device: torch.device,
    ) -> Arrival:
        """Send the peers' parts, expect theirs. A message of no bytes is not sent.

        Collective between any two ranks that have something for each other: both must post
        in the same order.
        """
        sends, sent = {}, {}
        for peer, parts in outgoing.items():
            sends[peer] = _pack(parts, device)
            sent[peer] = [(part.kind, _num_bytes(part.tensor)) for part in parts]
        buffers = {
            peer: torch.empty(_total(slots), dtype=torch.uint8, device=device)
            for peer, slots in incoming.items()
        }
        received = {
            peer: [(slot.kind, slot.num_bytes) for slot in slots]
            for peer, slots in incoming.items()
        }
        handle = self._comm.post(sends, buffers, sent, received)
        if self._eager:
            handle.wait()
        return Arrival(handle, buffers, incoming)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _total(slots: Sequence[Slot]) -> int:
    return sum(_aligned(slot.num_bytes) for slot in slots)


def _pack(parts: Sequence[Part], device: torch.device) -> Tensor:
    total = sum(_aligned(_num_bytes(part.tensor)) for part in parts)
    message = torch.empty(total, dtype=torch.uint8, device=device)
    at = 0
    for _, tensor in parts:
        size = _num_bytes(tensor)
        if size:
            message[at : at + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += _aligned(size)
    return message


def _unpack(message: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    parts, at = [], 0
    for slot in slots:
        size = slot.num_bytes
        parts.append(message[at : at + size].view(slot.dtype).view(slot.shape))
        at += _aligned(size)
    return parts
