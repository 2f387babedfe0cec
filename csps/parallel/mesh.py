"""The grid of ranks and its process groups.

Rank p = s * tp + t: `s` on the sequence axis (KV by token range), `t` on the tensor axis
(weights and heads). Ranks of one row share `s` and lie next to each other, so that the
chattier tensor axis stays inside a machine. Each lane has process groups of its own:
lanes never queue behind each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from csps.core.errors import ConfigError
from csps.core.plan import Lane


@dataclass(frozen=True, slots=True)
class LaneGroups:
    """Process groups of one lane that this rank belongs to (None where it would be alone).

    `all`: every rank, for steps in the TP layout.
    """

    sequence: dist.ProcessGroup | None
    tensor: dist.ProcessGroup | None
    all: dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place: row `s` of `sp`, column `t` of `tp`.

    `sharers`: ranks on its device, itself among them. `staged`: transfers go through the host's
    memory (csps.parallel.staged).
    """

    sp: int
    tp: int
    s: int
    t: int
    device: torch.device
    lanes: dict[Lane, LaneGroups]
    sharers: int = 1
    staged: bool = False

    @property
    def size(self) -> int:
        """All ranks."""
        return self.sp * self.tp


def build_mesh(
    *,
    rank: int,
    world_size: int,
    tp: int,
    lanes: Sequence[Lane],
    device: torch.device,
    sharers: int,
    staged: bool,
    timeout_s: float,
) -> Mesh:
    """Make every lane's groups. Collective: all ranks call it, after init_process_group."""
    if world_size % tp:
        raise ConfigError(f"--tp: {tp} does not divide the number of ranks, {world_size}")
    sp = world_size // tp
    s, t = divmod(rank, tp)
    groups = {}
    timeout = timedelta(seconds=timeout_s)
    for lane in lanes:
        is_urgent = lane is Lane.DECODE and device.type == "cuda" and not staged
        columns = [[row * tp + col for row in range(sp)] for col in range(tp)]
        rows = [[row * tp + col for col in range(tp)] for row in range(sp)]
        sequence = _groups(columns, timeout, is_urgent)
        tensor = _groups(rows, timeout, is_urgent)
        # Where a row is all there is, its group serves both layouts.
        everyone = tensor if sp == 1 else _groups([list(range(world_size))], timeout, is_urgent)
        groups[lane] = LaneGroups(sequence[t], tensor[s], everyone[0])
        if device.type == "cuda" and not staged:
            _connect(groups[lane], device)
    return Mesh(sp=sp, tp=tp, s=s, t=t, device=device, lanes=groups, sharers=sharers, staged=staged)


def _groups(
    members: list[list[int]], timeout: timedelta, is_urgent: bool
) -> list[dist.ProcessGroup | None]:
    # Every rank must make every group, in the same order, also those it is not part of.
    return [
        dist.new_group(ranks, timeout=timeout, pg_options=_urgent(timeout) if is_urgent else None)
        if len(ranks) > 1
        else None
        for ranks in members
    ]


def _connect(groups: LaneGroups, device: torch.device) -> None:
    """Make NCCL's communicators, and take their memory, now. Collective over each group.

    NCCL makes one in its group's first transfer, which waits until all the group's ranks take part;
    that of a step may be between those alone that share a sequence.
    """
    for group in (groups.sequence, groups.tensor, groups.all):
        if group is not None:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize(device)


def _urgent(timeout: timedelta) -> object:
    """Options of an NCCL group whose transfers run on a high-priority stream."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
