"""What `vtprune serve` asks of memory, and where API processes encode, as vLLM's own options and configs say it.

There is no GPU: vLLM's platform is replaced, and torch says that there are eight.
"""

import argparse
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from vllm import AsyncEngineArgs
from vllm.config import KVTransferConfig, ModelConfig, ParallelConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_vtprune.devices import CONTEXT, GIB, device_for
from vllm_vtprune.plugin import gpu, vision
from vllm_vtprune.plugin.compat import counts_must_be_fixed
from vllm_vtprune.plugin.families.llava import WITH_CLIP
from vllm_vtprune.plugin.register import register
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.vision_encoder import EncoderError
from vllm_vtprune_checkpoints import embedded_checkpoint
from vllm_vtprune_server import memory
from vllm_vtprune_server.policies import Policies

CARD = 80 * GIB
MODEL = str(embedded_checkpoint())
PRODUCER = '{"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}'
CONSUMER = '{"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}'
Parse: TypeAlias = Callable[..., argparse.Namespace]


@pytest.fixture(scope="module")
def parse() -> Parse:
    """Options of `vtprune serve`, as that reads them."""
    parser = FlexibleArgumentParser()
    memory.mark_defaults(ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser")))

    def parse(*options: str) -> argparse.Namespace:
        args = parser.parse_args(["serve", MODEL, *options])
        args.model = MODEL
        return args

    return parse


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    register()
    return AsyncEngineArgs(model=MODEL).create_model_config()


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(
        _enum=SimpleNamespace(name="CUDA"),
        is_cpu=lambda: False,
        get_device_total_memory=lambda: CARD,
        visible_device_id_to_physical_device_id=lambda index: index,
    )
    for module in (gpu, memory):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=CARD))
    monkeypatch.delenv("VTPRUNE_DEVICE", raising=False)


# --- On CPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "variable", "kv_cache"),
    [
        ([], None, GIB),
        ([], "", GIB),
        ([], "2", None),
        (["--gpu-memory-utilization", "0.92"], None, None),
        (["--gpu_memory_utilization=0.5"], None, None),
        (["--kv-cache-memory-bytes", "5"], None, 5),
    ],
)
def test_the_embedded_model_takes_little_unless_told_otherwise(
    parse: Parse,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    variable: str | None,
    kv_cache: int | None,
) -> None:
    if variable is not None:
        monkeypatch.setenv(memory.CPU_VARIABLE, variable)
    args = parse(*options)
    memory.limit_embedded_kv_cache(args)
    assert args.kv_cache_memory_bytes == kv_cache


def test_other_models_take_what_vllm_takes(parse: Parse) -> None:
    args = parse()
    args.model = "some/model"
    memory.limit_embedded_kv_cache(args)
    assert args.kv_cache_memory_bytes is None
    memory.unmark_defaults(args)
    assert (type(args.gpu_memory_utilization), args.gpu_memory_utilization) == (float, 0.92)


@pytest.mark.parametrize(
    ("free", "fraction", "kv_cache", "message"),
    [
        (15, 0.92, None, ""),
        (10, 0.92, None, "92% of this machine's memory, which is 14.7 GiB, and 10.0 of 16.0 GiB are free; set VLLM_"),
        (10, 0.92, None, "--gpu-memory-utilization to 0.5"),
        (10, 0.92, 4, ""),
        (3, 0.92, 4, "a KV cache, which is 4.0 GiB, and 3.0 of 16.0 GiB are free; set VLLM_CPU_KVCACHE_SPACE to fewer"),
        (-1, 0.92, 4, "and 0.0 of 16.0 GiB are free"),
    ],
)
def test_lack_of_memory_says_what_to_set(free: int, fraction: float, kv_cache: int | None, message: str) -> None:
    asked = None if kv_cache is None else kv_cache * GIB
    warning = memory.lack_of_memory(total=16 * GIB, free=free * GIB, fraction=fraction, kv_cache=asked)
    assert message in warning
    assert bool(warning) is bool(message)


def test_a_machine_without_an_engine_lacks_nothing(parse: Parse) -> None:
    assert memory.cpu_memory_problem(parse("--gpu-memory-utilization", "1"))
    assert not memory.cpu_memory_problem(parse("--gpu-memory-utilization", "1", "--data-parallel-size-local", "0"))


# --- On GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ([], [0]),
        (["--tensor-parallel-size", "4"], [0]),
        (["--api-server-count", "3"], [0, 0, 0]),
        (["--data-parallel-size", "8"], list(range(8))),
        (["--data-parallel-size", "2", "--tensor-parallel-size", "4"], [0, 4]),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "2"], [0, 1, 0, 1]),
        (["--data-parallel-size", "2", "--api-server-count", "3"], [0, 1, 0]),
        (["--device-ids", "4,5"], [4]),
        (["--device-ids", "4,5", "--data-parallel-size", "2"], [4, 5]),
        (["--data-parallel-size", "2", "--data-parallel-rank", "1"], [0]),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-hybrid-lb"], [0, 1]),
        (
            ["--data-parallel-size", "4", "--data-parallel-size-local", "4", "--data-parallel-multi-port-external-lb"],
            [0, 1, 2, 3],
        ),
        (["--headless", "--data-parallel-size", "4", "--data-parallel-size-local", "2"], []),
        (["--nnodes", "2", "--data-parallel-size", "4"], [0, 1, 0, 1]),
    ],
)
def test_api_processes_are_those_that_vllm_starts(parse: Parse, options: list[str], devices: list[int]) -> None:
    placements = [device_for("auto", process) for process in memory.api_processes(parse(*options))]
    assert placements == [f"cuda:{device}" for device in devices]


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("options", "device", "reserved"),
    [
        ([], "auto", 0.97),  # next to no weights
        (["--data-parallel-size", "8"], "auto", 0.97),
        (["--api-server-count", "4"], "auto", 0.99),  # one encoder, four plans at a time
        (
            ["--data-parallel-size", "4", "--data-parallel-size-local", "4", "--data-parallel-multi-port-external-lb"],
            "cuda:0",
            3.88,  # four servers
        ),
        (["--mm-ipc-gpu-memory-gb", "7"], "auto", 7.0),
        ([], "cuda:1", 0.0),  # which has no engine
        (["--headless"], "auto", 0.0),
        (["--mm-encoder-only"], "auto", 0.0),
        (["--ec-transfer-config", PRODUCER], "auto", 0.97),
        (["--ec-transfer-config", CONSUMER], "auto", 0.0),  # it follows the producer's plans
    ],
)
def test_every_gpu_leaves_room_for_the_encoders_that_share_it(
    parse: Parse,
    model_config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    device: str,
    reserved: float,
) -> None:
    monkeypatch.setenv("VTPRUNE_DEVICE", device)
    args = parse(*options)
    memory.reserve_gpu_memory(args, model_config)
    assert args.mm_ipc_gpu_memory_gb == pytest.approx(reserved, rel=0.01)


@pytest.mark.usefixtures("eight_gpus")
def test_too_little_is_refused_with_both_numbers(parse: Parse, model_config: ModelConfig) -> None:
    with pytest.raises(
        SystemExit,
        match=r"--mm-ipc-gpu-memory-gb=0\.5 does not hold the vision encoder; expected 0\.89 or more, and 0\.97 for",
    ):
        memory.reserve_gpu_memory(parse("--mm-ipc-gpu-memory-gb", "0.5"), model_config)


@pytest.mark.usefixtures("eight_gpus")
def test_a_device_that_is_not_known_is_asked_for_before_the_engine_starts(
    parse: Parse, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"no engine runs on this machine.*; set VTPRUNE_DEVICE to cuda:INDEX"):
        memory.reserve_gpu_memory(parse("--data-parallel-size-local", "0"), model_config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=r"this process sees no GPU"):
        memory.reserve_gpu_memory(parse(), model_config)


@pytest.mark.usefixtures("eight_gpus")
def test_encoding_on_the_cpu_beside_a_gpu_is_refused_before_the_engine_starts(
    parse: Parse, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPRUNE_DEVICE", "cpu")
    with pytest.raises(SystemExit, match=r"on GPUs, not on the CPU; set VTPRUNE_DEVICE to auto or cuda:INDEX"):
        memory.reserve_gpu_memory(parse(), model_config)


@pytest.mark.usefixtures("eight_gpus")
def test_api_processes_without_an_engine_encode_on_the_gpu_that_they_are_told(
    parse: Parse, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPRUNE_DEVICE", "cuda:2")
    args = parse("--data-parallel-size", "2", "--data-parallel-size-local", "0")
    assert [device_for("cuda:2", process) for process in memory.api_processes(args)] == ["cuda:2", "cuda:2"]
    memory.reserve_gpu_memory(args, model_config)
    assert args.mm_ipc_gpu_memory_gb == 0


@pytest.mark.usefixtures("eight_gpus")
def test_a_model_that_cannot_be_pruned_reserves_nothing(parse: Parse) -> None:
    args = parse()
    memory.reserve_gpu_memory(args, SimpleNamespace(is_multimodal_model=False))  # type: ignore[arg-type]
    assert args.mm_ipc_gpu_memory_gb == 0


def test_nothing_is_reserved_on_cpus(parse: Parse, model_config: ModelConfig) -> None:
    args = parse()
    memory.reserve_gpu_memory(args, model_config)
    assert args.mm_ipc_gpu_memory_gb == 0


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ([], False),
        (["--api-server-count", "1", "--data-parallel-size", "2"], False),
        (["--api-server-count", "2"], True),
        (["--data-parallel-size", "2"], True),
        (["--data-parallel-size", "2", "--data-parallel-rank", "1"], False),
        (["--data-parallel-size", "2", "--data-parallel-multi-port-external-lb"], False),
        (["--headless"], False),
    ],
)
def test_several_api_processes_share_their_encoders(parse: Parse, options: list[str], shared: bool) -> None:
    assert memory.shares_encoders(parse(*options)) is shared


# --- In the process that encodes -------------------------------------------------------------------------------------


def engine(**parallel: Any) -> Any:
    """An engine's config, as far as it is read."""
    config = ParallelConfig(**{name: value for name, value in parallel.items() if not name.startswith("_")})
    for name, value in parallel.items():
        setattr(config, name, value)
    return SimpleNamespace(parallel_config=config)


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("parallel", "device"),
    [
        ({}, "cuda:0"),
        ({"assigned_physical_gpu_ids": [4, 5]}, "cuda:4"),
        ({"data_parallel_size": 8, "data_parallel_size_local": 8, "_api_process_rank": 5}, "cuda:5"),
        ({"data_parallel_size": 8, "data_parallel_size_local": 4, "_api_process_rank": 5}, "cuda:1"),
        (
            {"data_parallel_size": 2, "data_parallel_size_local": 2, "tensor_parallel_size": 4, "_api_process_rank": 1},
            "cuda:4",
        ),
    ],
)
def test_an_api_process_encodes_beside_its_engine(parallel: dict[str, Any], device: str) -> None:
    assert device_for("auto", gpu.process_of(engine(_api_process_count=8, **parallel))) == device


@pytest.mark.usefixtures("eight_gpus")
def test_of_a_processor_of_llm_nothing_is_known_but_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_for("auto", gpu.process_of(None)) == "cuda:0"
    monkeypatch.setenv("VLLM_DP_RANK_LOCAL", "1")
    with pytest.raises(EncoderError, match="the GPU of data-parallel rank 1 is unknown here"):
        device_for("auto", gpu.process_of(None))


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("reserved", "processes", "share", "warned"),
    [
        (8.0, 1, 8.0, False),
        (8.0, 4, 2.0, False),
        (0.0, 1, None, True),  # what it needs
        (0.95, 1, 0.95, True),
    ],
)
def test_torch_takes_no_more_than_was_reserved(
    model_config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    reserved: float,
    processes: int,
    share: float | None,
    warned: bool,
) -> None:
    limits: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    warnings: list[str] = []
    monkeypatch.setattr(gpu.logger, "warning", warnings.append)
    need = gpu.footprint_of(model_config, WITH_CLIP, 576)
    gpu.limit_memory(gpu.place_of(engine(_api_process_count=processes)), need, reserved)
    [(fraction, device)] = limits
    allowed = need.total if share is None else share * GIB
    assert (fraction * CARD, str(device)) == (pytest.approx(max(allowed - CONTEXT, 2**28)), "cuda:0")
    assert (f"--mm-ipc-gpu-memory-gb={reserved:g}" in "".join(warnings)) is warned


def test_one_line_says_where_the_encoder_is_and_how_large(
    model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vllm.vtprune"):
        vision_encoder = vision.load(WITH_CLIP, model_config, largest=576, place=gpu.place_of(None))
    [line] = {
        message for message in caplog.messages if "ision encoder" in message
    }  # other tests may have it caught twice
    assert line.endswith(f", {vision_encoder.nbytes / 2**20:.0f} MiB on cpu")
    monkeypatch.setenv("VTPRUNE_DEVICE", "cuda")
    with pytest.raises(EncoderError, match="encodes images on the CPU, not on cuda; set VTPRUNE_DEVICE to auto"):
        gpu.place_of(None)


# --- KV transfer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("connector", "option"),
    [
        (None, ""),
        ("OffloadingConnector", ""),
        ("SimpleCPUOffloadConnector", ""),
        ("NixlConnector", "kv_transfer_config.kv_connector=NixlConnector"),
        ("MultiConnector", "kv_transfer_config.kv_connector=MultiConnector"),
    ],
)
def test_counts_are_fixed_where_instances_exchange_caches(connector: str | None, option: str) -> None:
    assert counts_must_be_fixed(None) == ""
    assert counts_must_be_fixed(KVTransferConfig(kv_connector=connector, kv_role="kv_both")) == option


@pytest.mark.parametrize(
    "policy",
    ["balanced", {"budget": {"type": "energy"}}, {"method": "prumerge", "budget": {"type": "method"}}],
)
def test_a_policy_whose_count_depends_on_features_is_refused_where_counts_are_fixed(policy: Any) -> None:
    policies = Policies.of(fixed_counts="kv_transfer_config.kv_connector=X")
    Policies.of().parse(policy)
    with pytest.raises(PolicyError) as refused:
        policies.parse(policy, param="messages.0.content.0.pruning")
    assert refused.value.param == "messages.0.content.0.pruning"
    assert "cannot be used with kv_transfer_config.kv_connector=X" in str(refused.value)
    with pytest.raises(PolicyError, match=r"^--pruning-default: a budget of the type"):
        Policies.of(policy, fixed_counts="kv_transfer_config.kv_connector=X")


@pytest.mark.parametrize("policy", [False, "off", "fast", {"budget": {"type": "tokens", "keep": 64}}])
def test_other_policies_are_not(policy: Any) -> None:
    Policies.of(policy, fixed_counts="kv_transfer_config.kv_connector=X").parse(policy)
