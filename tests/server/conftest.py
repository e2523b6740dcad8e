"""The server that most tests of this folder talk to, started once."""

import json
import os
from collections.abc import Iterator

import pytest

from tests.support.chat import ONE_ENGINE_PROCESS, SMALL_KV_CACHE, Server
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_server.process import running_server

DEFAULT_KEEP = 96
BLOCK = 32
SERVED_NAMES = ("vtprune-demo", "llava")
PRESETS = """
[thumbnail]
budget = {type = "tokens", keep = 24}

[quality]  # in the place of the package's
method = "uniform"
budget = {type = "tokens", keep = 400}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vtprune serve` with a small random checkpoint; requests without a policy keep 96 tokens.

    In float32, so that the same prompt gets the same answer whatever part of it the prefix cache knows.
    """
    folder = tmp_path_factory.mktemp("server")
    for name in ("server", "evaluation"):  # a user's own modules, which ours must not take for theirs
        (folder / f"{name}.py").write_text(f"raise ImportError('the {name}.py of a user')\n")
    log = folder / "server.log"
    (folder / "presets.toml").write_text(PRESETS)
    options = [
        str(tiny_checkpoint()),
        *("--served-model-name", *SERVED_NAMES),
        *("--pruning-presets", str(folder / "presets.toml")),
        *("--pruning-default", json.dumps({"budget": {"type": "tokens", "keep": DEFAULT_KEEP}})),
        *("--max-model-len", "2048"),
        *SMALL_KV_CACHE,
        *ONE_ENGINE_PROCESS,
        *("--dtype", "float32"),
        *("--block-size", str(BLOCK)),
        *("--limit-mm-per-prompt", '{"image": 3}'),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        "--enable-mm-embeds",
        "--pruning-detail",
        "--pruning-playground",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
    ]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running_server(options, log=log, environment=environment) as url:
        yield Server(url, log)


@pytest.fixture(scope="session")
def default_keep() -> int:
    return DEFAULT_KEEP


@pytest.fixture(scope="session")
def block() -> int:
    """Tokens of a KV-cache block: the prefix cache works in whole blocks."""
    return BLOCK


@pytest.fixture(scope="session")
def served_names() -> tuple[str, ...]:
    """The names under which the model is served; the first is that of its metrics."""
    return SERVED_NAMES
