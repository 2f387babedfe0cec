"""What the loader needs of a weight file, whatever its format."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class TensorSource(Protocol):
    """Tensors of one checkpoint, known by the names of Hugging Face's LlamaForCausalLM."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the files, by the file's own name."""
        ...

    def file_name(self, name: str) -> str:
        """The file's own name of the tensor that Hugging Face calls `name`."""
        ...

    def is_ignorable(self, file_name: str) -> bool:
        """Whether the model does not need this tensor: old buffers and the like."""
        ...

    def read(self, file_name: str, rows: slice, columns: slice) -> Tensor:
        """Those rows, and columns if it is a matrix, on the CPU in any floating-point dtype.

        CheckpointError if the file is cut short or of a kind that cannot be read.
        """
        ...
