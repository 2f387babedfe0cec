"""CUDA graphs: what a function launches is recorded once, and from then on launched at once."""

import torch
from torch import Tensor

from csps.engine.bucketed import Forward
from csps.parallel.overlap import CommClock

# Of the streams of decode: what a graph launches has that of the stream it was captured on.
URGENT = -1


class GraphCapture:
    """Captures functions that run one at a time; their graphs share memory.

    `clock`: of their transfers, whose bytes it goes on counting. How long they take it is not told.
    """

    def __init__(self, device: torch.device, clock: CommClock) -> None:
        self._clock = clock
        self._stream = torch.cuda.Stream(device, priority=URGENT)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> Forward:
        """The graph of `forward`, which launches kernels and transfers and does nothing else.

        It must not wait for the device, and what it reads must stay where it is. The output is
        valid until any of the graphs runs again. Collective where `forward` is.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not to be captured: kernels that are compiled, workspaces and connections that libraries
        # make.
        with torch.cuda.stream(self._stream):
            forward()
        graph = torch.cuda.CUDAGraph()
        self._clock.reset()
        # Other threads may go on allocating memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = forward()

        sent, received = self._clock.bytes_sent, self._clock.bytes_received
        self._clock.reset()

        def replay() -> Tensor | None:
            graph.replay()
            self._clock.count(sent, received)
            return output

        return replay
