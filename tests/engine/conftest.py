"""The engines of this folder, each started once: a start takes longer than most tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import MODEL_RUNNERS, Engine, running_engine
from vllm_vtprune_checkpoints import write_checkpoint

QWEN_OPTIONS: dict[str, Any] = {
    "max_model_len": 4096,
    "limit_mm_per_prompt": {"image": 4, "video": 1},
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 64,
    "skip_mm_profiling": True,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Leave the cores to the engines: small kernels on several threads crawl where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def placement_api() -> Iterator[None]:
    """Tokens are selected in the API process by processors that are made in this module, whatever the budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTPRUNE_PLACEMENT", "api")
        yield


@pytest.fixture(scope="session", params=["V1", pytest.param("V2", marks=pytest.mark.verify)])
def model_runner(request: pytest.FixtureRequest) -> str:
    """Which of vLLM's model runners the engines below have, but for `uncached`. `test_v2.py` is V2's in `make test`."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llava", tmp_path_factory.mktemp("llava-tiny"), size="tiny", dtype="float32")


@pytest.fixture(scope="session")
def cached(checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    """vLLM's defaults: every cache is on. Its processes can be looked into."""
    with running_engine(
        checkpoint,
        "cached",
        environment=MODEL_RUNNERS[model_runner],
        distributed_executor_backend="tests.support.processes.ObservedExecutor",
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def uncached(checkpoint: Path) -> Iterator[Engine]:
    """Every cache is off, and the model runner is V1: what the others are compared with."""
    with running_engine(
        checkpoint,
        "uncached",
        environment={"VTPRUNE_FEATURE_CACHE_GB": "0", **MODEL_RUNNERS["V1"]},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def chunked(checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    """Prefill in chunks smaller than an image, prefix cache on, a memory of one report; takes embeddings as images."""
    with running_engine(
        checkpoint,
        "chunked",
        environment={"VTPRUNE_REPORT_TABLE_SIZE": "1", **MODEL_RUNNERS[model_runner]},
        enable_chunked_prefill=True,
        max_num_batched_tokens=64,
        enable_mm_embeds=True,
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen-tiny"), size="tiny", dtype="float32")


@pytest.fixture(scope="session")
def qwen(qwen_checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    """Qwen2.5-VL, every cache on, prefill in chunks smaller than an image."""
    with running_engine(qwen_checkpoint, "qwen", environment=MODEL_RUNNERS[model_runner], **QWEN_OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="session")
def qwen3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_vl", tmp_path_factory.mktemp("qwen3-tiny"), size="tiny", dtype="float32")


@pytest.fixture(scope="session")
def qwen3(qwen3_checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    """Qwen3-VL, the same."""
    with running_engine(qwen3_checkpoint, "qwen3", environment=MODEL_RUNNERS[model_runner], **QWEN_OPTIONS) as engine:
        yield engine
