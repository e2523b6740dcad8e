"""The vision encoder processes of a server with several API processes: one per device, restarted when it ends."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead
from vllm import AsyncEngineArgs
from vllm.config import ModelConfig
from vllm.logger import configure_logging_from_args
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins
from vllm.utils.system_utils import decorate_logs, set_process_title

from vllm_vtprune import metrics
from vllm_vtprune.placement import EncoderPlace
from vllm_vtprune.plugin.encoder_client import SOCKETS
from vllm_vtprune.plugin.encoder_server import EncoderServer
from vllm_vtprune.plugin.image import BLANK, preprocess
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import EngineWeights
from vllm_vtprune.tower import TowerError
from vllm_vtprune_server import memory

NAME = "Encoder"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LONGEST_DELAY = 30.0
"""Most seconds before a restart; doubles from 1 with each end within `STEADY` seconds of a start. The first is
immediate."""
STEADY = 60.0

spawn = multiprocessing.get_context("spawn")  # as vLLM starts API processes


# --- In the launching process -------------------------------------------------------------------------------------


@contextmanager
def running_encoders(args: argparse.Namespace, model_config: ModelConfig) -> Iterator[None]:
    """Run the encoder processes that a server's API processes share; none if they share none.

    Args:
        args: the server's options.
        model_config: vLLM's config of the model.
    """
    os.environ.pop(SOCKETS, None)
    shared = memory.shares_encoders(args) and memory.prunes_outside_engine(args)
    if not shared or memory.pruning_processor(model_config) is None:
        yield
        return
    try:
        places = memory.places_of(args)
    except TowerError as error:
        sys.exit(f"vtprune serve: {error}")
    with tempfile.TemporaryDirectory(prefix="vtprune-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        os.environ[SOCKETS] = folder  # API processes inherit it
        for place in places:
            supervisor = Supervisor(args, place, Path(folder))
            supervisor.start()
            stack.callback(supervisor.stop)
        yield


class Supervisor:
    """Starts the encoder process of one device, and starts it again whenever it ends.

    Args:
        args: the server's options.
        place: the device, and the number of API processes that encode there.
        folder: for the socket. Removed if the process ends before it is ready for the first time: then API processes,
            and with them the server, end too.
        run: what the process does; arguments as of `run_encoder`.
    """

    def __init__(
        self, args: argparse.Namespace, place: EncoderPlace, folder: Path, run: Callable[..., None] | None = None
    ) -> None:
        self._args, self._place, self._folder = args, place, folder
        self._target = run_encoder if run is None else run
        self._ready, self._loaded = spawn.Event(), spawn.Event()
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="vtprune-encoders", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Kill the process, which holds nothing that must be saved."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)

    def _run(self) -> None:
        while METRICS_FOLDER not in os.environ:  # vLLM sets it before it starts API processes
            if self._stopping.wait(0.01):
                return
        delay, restarted = 0.0, False
        while not self._stopping.wait(delay):
            started = time.monotonic()
            process = spawn.Process(
                target=self._target,
                args=(self._args, self._place, self._folder, self._ready, self._loaded, restarted),
                name=f"{NAME}_{self._place.device}",
                daemon=True,
            )
            process.start()
            wait([process.sentinel, self._stop_read])
            process.kill()
            process.join()
            mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                return
            name = f"the vision encoder process on {self._place.device}"
            end = f"vtprune serve: {name} ended with status {process.exitcode}"
            if not self._ready.is_set():
                print(f"{end} before it was ready; see its last log lines above", file=sys.stderr)
                shutil.rmtree(self._folder, ignore_errors=True)
                return
            steady = time.monotonic() - started > STEADY
            delay = 0.0 if steady or not restarted else min(max(2 * delay, 1.0), LONGEST_DELAY)
            restarted = True
            print(f"{end}; it is restarted in {delay:g} s", file=sys.stderr)


# --- In an encoder process ----------------------------------------------------------------------------------------


def run_encoder(
    args: argparse.Namespace, place: EncoderPlace, folder: Path, ready: Event, loaded: Event, restarted: bool
) -> None:
    """Encode and plan for API processes until the launching process kills this one, or ends.

    Args:
        args: the server's options.
        place: the device, and the number of API processes that encode there.
        folder: for the socket, which is named after the device.
        ready: set when API processes can connect.
        loaded: set when the encoder has been loaded; if it is set already, the encoder is loaded before anybody can
            connect.
        restarted: whether another process did this before.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # requests in progress need this process until the server ends
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    configure_logging_from_args(args)
    decorate_logs(NAME)
    set_process_title(NAME, place.device)
    load_general_plugins()
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    assert isinstance(processor, PruningProcessor)
    processor.encoder_place = place
    processor.weights = EngineWeights(model_config.model, from_start=True)
    runtime = processor.runtime
    server = EncoderServer(
        runtime,
        clients=place.clients,
        follow=lambda: processor.weights.follow(runtime, selects=False),
        warm_up=lambda: runtime.encoder.warm_up(preprocess(processor, BLANK)),
        on_load=loaded.set,
    )
    if restarted:
        metrics.ENCODER_RESTARTS.labels(runtime.model_name).inc()
    if loaded.is_set():
        server.follow()
        server.warm_up()
    path = folder / place.device
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        ready.set()
        server.serve(listener)


def _end_with_parent() -> None:
    """End this process when the launching process has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
