"""CUDA graphs: what a function launches is recorded once, and from then on launched at once."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphCapture:
    """Captures functions that run one at a time; their graphs share memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The graph of `forward`, which launches kernels and does nothing else.

        It must not wait for the device, and what it reads must stay where it is. The output is
        valid until any of the graphs runs again.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not to be captured: kernels that are compiled, workspaces that libraries make.
        with torch.cuda.stream(self._stream):
            forward()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = forward()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
