"""Kernels run on a GPU where there is one, else in Triton's interpreter, and then not in bf16:
there it silently computes garbage."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
if not (torch.cuda.is_available() and find_spec("flashinfer")):
    collect_ignore_glob.append("test_flashinfer.py")
if not (find_spec("gguf") and find_spec("transformers")):  # which write their checkpoints
    collect_ignore_glob += ["test_served.py", "test_shared_gpu.py"]

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """What kernels compute in."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """New tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
