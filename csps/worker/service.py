"""A rank's side of the Attach stream: reports up, commands down, until told to stop."""

import logging
import os
import queue
import socket
import threading
import traceback
from collections.abc import Iterator

import grpc
import torch.distributed as dist

from csps import __version__
from csps.core.errors import CspsError, UnavailableError
from csps.core.plan import Lane, StepResult
from csps.engine.runner import Runner
from csps.rpc import convert
from csps.rpc.options import COMMON_OPTIONS
from csps.v1 import worker_pb2, worker_pb2_grpc
from csps.worker.build import build_runner
from csps.worker.lanes import LaneThread
from csps.worker.metrics import WorkerMetrics
from csps.worker.place import Place, connect_ranks, num_cpu_threads, pick_device

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
Reports = queue.SimpleQueue[worker_pb2.WorkerReport | None]


class Worker:
    """One rank. `run` returns when the coordinator says so and raises when it is gone."""

    def __init__(
        self,
        coordinator: str,
        place: Place,
        *,
        join_timeout_s: float,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._coordinator = coordinator
        self._place = place
        self._join_timeout_s = join_timeout_s
        self._reports: Reports = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._is_loading = False

    def run(self) -> None:
        """Join, load, run steps. Raises UnavailableError if the coordinator is lost or refuses.

        Also if the rank itself failed: the coordinator has been told why, and says so. After
        an error threads may be left inside a transfer that never ends.
        """
        with grpc.insecure_channel(self._coordinator, options=COMMON_OPTIONS) as channel:
            self._wait_for_coordinator(channel)
            self._reports.put(self._hello())
            call = worker_pb2_grpc.WorkerStub(channel).Attach(iter(self._reports.get, None))
            call.add_callback(self._on_stream_end)
            stop_heartbeat = threading.Event()
            threading.Thread(
                target=self._heartbeat, args=(stop_heartbeat,), name="heartbeat", daemon=True
            ).start()
            try:
                self._serve(call)
            except grpc.RpcError as error:
                if self._failure is not None:
                    raise self._failure from None  # it may not have reached the coordinator
                raise UnavailableError(_describe(error, self._coordinator)) from error
            finally:
                stop_heartbeat.set()
                self._reports.put(None)
        if self._failure is not None:
            raise UnavailableError(
                f"rank {self._place.rank} failed; the coordinator at {self._coordinator} says why"
            ) from self._failure

    def _wait_for_coordinator(self, channel: grpc.Channel) -> None:
        try:
            grpc.channel_ready_future(channel).result(self._join_timeout_s)
        except grpc.FutureTimeoutError:
            raise UnavailableError(
                f"no coordinator answers at {self._coordinator} after "
                f"{self._join_timeout_s:.0f} s (--join-timeout)"
            ) from None

    def _on_stream_end(self) -> None:
        """Called in a thread of gRPC's. While the rank loads or waits for its peers, nothing
        else would notice that the coordinator is gone, and nothing can be interrupted.
        """
        if self._is_loading:
            logger.warning("the coordinator at %s closed the stream", self._coordinator)
            os._exit(1)

    def _serve(self, call: grpc.Call) -> None:
        commands: Iterator[worker_pb2.WorkerCommand] = iter(call)
        first = next(commands, None)
        if first is None:
            raise UnavailableError(f"the coordinator at {self._coordinator} closed the stream")
        setup = convert.setup_from_proto(first.setup)
        self._is_loading = True
        if not call.is_active():
            self._on_stream_end()
        try:
            mesh = connect_ranks(setup, self._place, pick_device(self._place.local_rank))
            built = build_runner(setup, self._place, mesh)
        except Exception as error:
            self._is_loading = False
            self._fail(error)
            self._drain(commands)
            return
        self._is_loading = False
        lanes = {
            lane: LaneThread(
                lane,
                built.runner,
                num_threads=num_cpu_threads(setup, self._place),
                report=self._report,
                fail=self._fail,
            )
            for lane in setup.placement.lanes
        }
        if self._metrics is not None:
            self._metrics.ready(built.num_pages)
        ready = worker_pb2.Ready(
            num_blocks=built.num_pages,
            attention_backend=built.backend,
            device=mesh.device.type,
        )
        self._reports.put(worker_pb2.WorkerReport(ready=ready))
        self._obey(commands, built.runner, lanes)
        if self._failure is None:
            for lane in lanes.values():
                lane.close()
            built.runner.close()
            dist.destroy_process_group()

    def _obey(
        self,
        commands: Iterator[worker_pb2.WorkerCommand],
        runner: Runner,
        lanes: dict[Lane, LaneThread],
    ) -> None:
        for command in commands:
            kind = command.WhichOneof("command")
            if kind == "plan":
                plan = convert.plan_from_proto(command.plan)
                lanes[plan.lane].put(plan)
            elif kind == "release":
                runner.release(list(command.release.seq_ids))
            elif kind == "shutdown":
                return
        raise UnavailableError(f"the coordinator at {self._coordinator} closed the stream")

    def _drain(self, commands: Iterator[worker_pb2.WorkerCommand]) -> None:
        """Let the failure report be sent: the coordinator answers it by closing the stream."""
        for _ in commands:
            pass

    def _hello(self) -> worker_pb2.WorkerReport:
        return worker_pb2.WorkerReport(
            hello=worker_pb2.Hello(
                rank=self._place.rank,
                world_size=self._place.world_size,
                version=__version__,
                host=socket.gethostname(),
                pid=os.getpid(),
            )
        )

    def _report(self, result: StepResult) -> None:
        if self._metrics is not None:
            self._metrics.step(result)
        self._reports.put(worker_pb2.WorkerReport(result=convert.result_to_proto(result)))

    def _fail(self, error: BaseException) -> None:
        """Called in any thread: tell the coordinator, which then ends the stream."""
        self._failure = error
        if isinstance(error, CspsError):  # meant for the operator: where it arose says nothing
            failure = worker_pb2.Failure(message=str(error))
        else:
            failure = worker_pb2.Failure(
                message=f"{type(error).__name__}: {error}",
                traceback="".join(traceback.format_exception(error)),
            )
        self._reports.put(worker_pb2.WorkerReport(failure=failure))

    def _heartbeat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_S):
            self._reports.put(worker_pb2.WorkerReport(heartbeat=worker_pb2.Heartbeat()))


def _describe(error: grpc.RpcError, coordinator: str) -> str:
    if not isinstance(error, grpc.Call):
        return f"coordinator {coordinator}: {error}"
    return f"coordinator {coordinator}: {error.code().name}: {error.details()}"
