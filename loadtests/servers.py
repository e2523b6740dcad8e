"""Stock vLLM and this project's server, with the same model and options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from vllm_vtprune_server.process import running_server

MODEL = "model"
OPTIONS = (
    "--served-model-name", MODEL, "--load-format", "dummy", "--enforce-eager", "--disable-uvicorn-access-log",
)  # fmt: skip
"""Options of every compared server: random weights, one model name."""
STOCK_COMMAND = ("-m", "vllm.entrypoints.openai.api_server")
ARMS = ("stock", "off", "balanced")
"""Stock vLLM; our server with ``pruning: false``; our server at the preset ``balanced``."""


def server(model: Path, options: Sequence[str], *, stock: bool, kv_cache_gb: int = 1) -> AbstractContextManager[str]:
    """Run stock vLLM or our server with a checkpoint; yields its URL.

    Args:
        model: folder of the checkpoint.
        options: vLLM's options besides `OPTIONS`.
        stock: run without our plugin.
        kv_cache_gb: KV cache on a CPU, in GiB.
    """
    options = [*OPTIONS, *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb), "HF_HUB_OFFLINE": "1"}
    if stock:
        environment["VLLM_PLUGINS"] = ""
        return running_server(["--model", str(model), *options], command=STOCK_COMMAND, environment=environment)
    return running_server([str(model), *options], environment=environment)


@contextmanager
def servers(model: Path, options: Sequence[str]) -> Iterator[dict[str, str]]:
    """Run both servers at the same time; yields the URL for each of `ARMS`."""
    with server(model, options, stock=True) as stock_url, server(model, options, stock=False) as our_url:
        yield dict(zip(ARMS, (stock_url, our_url, our_url), strict=True))
