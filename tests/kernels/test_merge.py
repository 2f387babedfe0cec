"""The merge of partial outputs against its twin: any number of them, some without keys."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csps.attention.backends import triton_decode
from csps.attention.merge import merge_rows, pack
from csps_kernels.merge import AT_A_TIME, merge, plan_merge
from csps_kernels.twins.merge import merge as twin
from tests.kernels.close import TOLERANCES, assert_like_twin

# By source, rows that it has a partial of.
CASES = {
    "all": [[0, 1, 2], [0, 1, 2]],
    "some": [[0, 3], [3], [], [4, 0, 2]],
    "none": [],
    "many": [[1, 2]] * (AT_A_TIME + 3) + [[2]] * AT_A_TIME,
}
NUM_ROWS = 5


class Case:
    """Random partials. A third of (o, lse) saw no key, and all of the last row's."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, num_heads: int, dim: int
    ) -> None:
        generator = torch.Generator().manual_seed(len(name) + num_heads + dim)
        self.rows = [np.array(rows, dtype=np.int64) for rows in CASES[name]]
        num_partials = sum(map(len, self.rows))

        def partials(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            o = torch.randn(num, num_heads, dim, generator=generator)
            lse = 3 * torch.randn(num, num_heads, generator=generator)
            lse[torch.rand(lse.shape, generator=generator) < 1 / 3] = -torch.inf
            return o.to(device, dtype), lse.to(device)

        self.o, self.lse = partials(num_partials, dtype)
        for source, rows in zip(
            self.lse.split([len(x) for x in self.rows]), self.rows, strict=True
        ):
            source[torch.from_numpy(rows == NUM_ROWS - 1).to(device)] = -torch.inf
        self.own = partials(NUM_ROWS, torch.float32)
        self.own[0][self.own[1].isneginf()] = 0.0


@pytest.fixture(params=CASES)
def case(request, device, dtype) -> Case:
    return Case(request.param, device, dtype, num_heads=3, dim=64)


@pytest.mark.parametrize("with_own", [False, True])
def test_equal_to_twin(case: Case, device, dtype, with_own: bool) -> None:
    own = case.own if with_own else None
    plan = plan_merge(case.rows, NUM_ROWS, device)
    out = torch.empty(NUM_ROWS, *case.o.shape[1:], dtype=dtype, device=device)
    lse = torch.empty(out.shape[:2], device=device)
    merge(case.o, case.lse, plan, out, lse, own)
    expected = twin(case.o, case.lse, case.rows, NUM_ROWS, own)
    assert_like_twin((out, lse), expected, dtype)
    if not with_own:
        assert not out[-1].any()
        assert lse[-1].isneginf().all()


@pytest.mark.parametrize(("num_heads", "dim"), [(1, 16), (2, 128), (9, 64)])
def test_packed_messages(device, dtype, num_heads: int, dim: int) -> None:
    """As torch merges them; rows of a message need not be aligned."""
    case = Case("some", device, dtype, num_heads, dim)
    message = pack(case.o, case.lse)
    out, expected = (torch.empty(NUM_ROWS, num_heads, dim).to(case.o) for _ in range(2))
    triton_decode.merge(case.rows, NUM_ROWS, device)(message, out, case.own)
    merge_rows(case.rows, NUM_ROWS, device)(message, expected, tuple(x.clone() for x in case.own))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_no_rows(device) -> None:
    out = torch.empty(0, 2, 16, device=device)
    merge(out, torch.empty(0, 2, device=device), plan_merge([], 0, device), out)
