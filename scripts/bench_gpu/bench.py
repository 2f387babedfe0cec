"""What a section measures with, and the rows that it leaves behind."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scripts.bench_gpu.sizes import Sizes
from scripts.bench_gpu.timing import Timer, Timing

Row = dict[str, Any]


class NotHereError(Exception):
    """A case cannot be measured here, and that is no mistake; its text says why."""


class Floors(NamedTuple):
    """What this machine does at best, measured: operations of matrix products, bytes copied.

    Bytes count twice: read and written.
    """

    flops_per_s: float
    bytes_per_s: float


@dataclass
class Bench:
    """One section. Cases that begin after `deadline` (time.perf_counter) are skipped.

    `save` keeps the rows after each case, so that a section that is killed leaves what it has.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    floors: Floors | None
    model: str
    deadline: float
    save: Callable[[list[Row]], None]
    rows: list[Row] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        self.timer = Timer(self.device)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def case(self, name: str, work: Callable[[], Row]) -> Row | None:
        """Add the row that `work` returns, or why there is none; the row if it worked."""
        if time.perf_counter() > self.deadline:
            row: Row = {"skipped": "the section's time was up"}
        else:
            try:
                row = work()
            except NotHereError as reason:
                row = {"skipped": str(reason)}
            except Exception as error:
                row = {
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "traceback": traceback.format_exc()[-8000:],
                }
        self.rows.append({"case": name, **row})
        self.save(self.rows)
        self.free()
        return None if "error" in row or "skipped" in row else row

    def timed(
        self,
        name: str,
        work: Callable[[], object],
        *,
        flops: float = 0.0,
        num_bytes: float = 0.0,
        **facts: Any,
    ) -> Row | None:
        """A case that times `work`, of so many operations of matrix products and bytes."""
        return self.case(
            name,
            lambda: {**self.beside_floor(self.timer(work), flops, num_bytes), **facts},
        )

    def beside_floor(self, timing: Timing, flops: float, num_bytes: float) -> Row:
        """`of_floor`: the least time this machine could take over the time it took."""
        row: Row = {**timing.columns, "flops": flops, "bytes": num_bytes}
        if flops:
            row["tflops"] = flops / timing.median_s / 1e12
        if num_bytes:
            row["gb_s"] = num_bytes / timing.median_s / 1e9
        row |= self.floor_of(timing.median_s, flops, num_bytes)
        return row

    def floor_of(self, seconds: float, flops: float, num_bytes: float) -> Row:
        """The floor of so much work, and how near `seconds` is to it."""
        if self.floors is None or not (flops or num_bytes):
            return {}
        by = {
            "matrix": flops / self.floors.flops_per_s,
            "memory": num_bytes / self.floors.bytes_per_s,
        }
        bound = max(by, key=by.__getitem__)
        return {"floor_s": by[bound], "bound": bound, "of_floor": by[bound] / seconds}

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random data on the device; zeros would be computed faster than what is served."""
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype
        )

    def free(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
