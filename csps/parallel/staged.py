"""Transfers by way of host memory, for ranks that share a GPU.

NCCL takes no two ranks on one GPU, and Gloo sends only what lies in the host's memory. So what
leaves is copied to the host once the current stream has come there, and the host waits for that;
what came is copied to the device when the caller waits for it, on the stream current then. The
caller's kernels see both in the order of its calls, as with NCCL. The host's buffers are never the
tensors themselves, on a CPU neither.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csps.parallel.overlap import CommClock, mark


def to_host(tensor: Tensor, clock: CommClock) -> Tensor:
    """What `tensor` has when the current stream comes here; the lane waits for the copy."""
    begun = mark(tensor.device)
    # Into pageable memory: `copy_` returns when it is done.
    host = torch.empty_like(tensor, device="cpu").copy_(tensor)
    clock.waited(begun, begun, mark(tensor.device))
    return host


class StagedHandle:
    """Ends a transfer into host buffers: `wait` copies `arrivals`, (tensor, its host buffer).

    `finish` returns when the buffers are filled; what it raises, `wait` raises. As with
    InlineHandle, comm_s counts up to the end of `wait`.
    """

    def __init__(
        self,
        finish: Callable[[], object],
        arrivals: Sequence[tuple[Tensor, Tensor]],
        clock: CommClock,
        device: torch.device,
    ) -> None:
        self._finish = finish
        self._arrivals = arrivals
        self._clock = clock
        self._device = device
        self._posted = mark(device)

    def wait(self) -> None:
        begun = mark(self._device)
        self._finish()
        for tensor, host in self._arrivals:
            tensor.copy_(host)
        self._clock.waited(self._posted, begun, mark(self._device))
