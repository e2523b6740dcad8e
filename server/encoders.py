"""The vision encoder processes of a server with several API processes: one per device."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vllm import AsyncEngineArgs
from vllm.config import ModelConfig
from vllm.logger import configure_logging_from_args
from vllm.plugins import load_general_plugins
from vllm.utils.system_utils import decorate_logs, set_process_title

from vllm_vtprune import metrics
from vllm_vtprune.devices import EncoderPlace
from vllm_vtprune.plugin.encoder_client import SOCKETS
from vllm_vtprune.plugin.encoder_server import EncoderServer
from vllm_vtprune.plugin.image import BLANK, preprocess
from vllm_vtprune.plugin.weights import EngineWeights
from vllm_vtprune.vision_encoder import EncoderError
from vllm_vtprune_server import memory
from vllm_vtprune_server.supervisor import Life, Supervisor

NAME = "Encoder"


@contextmanager
def running_encoders(args: argparse.Namespace, model_config: ModelConfig) -> Iterator[None]:
    """Run the encoder processes that a server's API processes share; none if they share none."""
    os.environ.pop(SOCKETS, None)
    shared = memory.shares_encoders(args) and memory.prunes_outside_engine(args)
    if not shared or memory.pruning_processor(model_config) is None:
        yield
        return
    try:
        places = memory.places_of(args)
    except EncoderError as error:
        sys.exit(f"vtprune serve: {error}")
    with tempfile.TemporaryDirectory(prefix="vtprune-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        os.environ[SOCKETS] = folder  # API processes inherit it
        for place in places:
            name, path = f"the vision encoder process on {place.device}", Path(folder) / place.device
            supervisor = Supervisor(name, path.parent, run_encoder, args, place, path)
            supervisor.start()
            stack.callback(supervisor.stop)
        yield


def run_encoder(args: argparse.Namespace, place: EncoderPlace, path: Path, life: Life) -> None:
    """Encode and plan for API processes, as long as this process lives.

    Args:
        args: the server's options.
        place: the device, and the number of API processes that encode there.
        path: the socket.
        life: if an earlier process had loaded the encoder, it is loaded before anybody can connect.
    """
    configure_logging_from_args(args)
    decorate_logs(NAME)
    set_process_title(NAME, place.device)
    load_general_plugins()
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    processor = memory.pruning_processor(model_config)
    assert processor is not None
    processor.encoder_place = place
    weights = processor.weights = EngineWeights(model_config.model, from_start=True)
    runtime = processor.runtime
    server = EncoderServer(
        runtime,
        clients=place.clients,
        follow=lambda: weights.follow(runtime, selects=False),
        warm_up=lambda: runtime.encoder.warm_up(preprocess(processor, BLANK)),
        on_load=life.loaded.set,
    )
    if life.restarted:
        metrics.ENCODER_RESTARTS.labels(runtime.model_name).inc()
    if life.loaded.is_set():
        server.follow()
        server.warm_up()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        life.ready.set()
        server.serve(listener)
