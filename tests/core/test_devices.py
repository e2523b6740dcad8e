"""Where an API process encodes, and how much memory is reserved for it on a GPU."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import pytest
import torch

from vllm_vtprune.devices import (
    CONTEXT,
    GIB,
    EncoderPlace,
    Footprint,
    Process,
    Reservation,
    allocator_fraction,
    device_for,
    encoder_places,
    reserve,
)
from vllm_vtprune.footprint import Shape, footprint
from vllm_vtprune.vision_encoder import EncoderError

ONE_GPU = Process("cuda", visible=(0,))
EIGHT = Process("cuda", visible=tuple(range(8)))
UNKNOWN = Process("cuda", visible=(0, 1), gpus=None)  # of vllm.LLM

# --- Where --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "device"),
    [
        (ONE_GPU, "cuda:0"),
        (Process("rocm", visible=(0,)), "cuda:0"),
        (replace(EIGHT, gpus=4), "cuda:0"),  # tensor parallel
        *((replace(EIGHT, engines=8, rank=rank), f"cuda:{rank}") for rank in (0, 1, 7)),  # data parallel
        *((replace(EIGHT, engines=2, gpus=4, rank=rank), f"cuda:{4 * (rank % 2)}") for rank in range(4)),
        *((replace(ONE_GPU, rank=rank), "cuda:0") for rank in range(3)),  # more API processes than engines
        (replace(EIGHT, engines=2, rank=3), "cuda:1"),  # half of the engines are on another machine
        (replace(EIGHT, first_engine=3), "cuda:3"),  # one of several servers of this machine
        (replace(EIGHT, assigned=(4, 5)), "cuda:4"),
        (replace(EIGHT, assigned=(4, 5), engines=2, rank=1), "cuda:5"),
        (Process("cuda", visible=(2, 3), assigned=(3,)), "cuda:1"),  # CUDA_VISIBLE_DEVICES=2,3 and a choice of them
        (Process("cuda", visible=(2, 3)), "cuda:0"),
        (replace(ONE_GPU, ray=True), "cuda:0"),
        (replace(EIGHT, ray=True, gpus=16), "cuda:0"),  # over two machines
        (replace(EIGHT, ray=True, engines=2, gpus=4, rank=1), "cuda:4"),
        (UNKNOWN, "cuda:0"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_process_encodes_where_its_engine_is(asked: str, process: Process, device: str) -> None:
    assert device_for(asked, process) == device


def test_on_cpus_there_is_one_device() -> None:
    assert device_for("auto", Process("cpu")) == device_for("cpu", Process("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("process", "problem"),
    [
        (replace(EIGHT, engines=0), "no engine runs on this machine"),  # API processes alone
        (replace(EIGHT, ray=True), "Ray chose the engine's GPU among 8 visible ones"),
        (replace(EIGHT, assigned=(8, 9)), "GPU 8 of engine 0 is not visible"),
        (replace(EIGHT, first_engine=8), "GPU 8 of engine 8 is not visible"),
        (replace(UNKNOWN, first_engine=1), "the GPU of data-parallel rank 1 is unknown here"),
    ],
)
def test_where_nobody_can_tell_it_is_asked_for(process: Process, problem: str) -> None:
    with pytest.raises(EncoderError, match=f"{problem}.*; set VTPRUNE_DEVICE to cuda:INDEX$"):
        device_for("auto", process)
    assert device_for("cuda:1", process) == "cuda:1"


@pytest.mark.parametrize(
    ("asked", "process", "problem"),
    [
        ("cpu", EIGHT, "encodes images on GPUs, not on the CPU; set VTPRUNE_DEVICE to auto or cuda:INDEX"),
        ("cpu", replace(EIGHT, engines=0), "encodes images on GPUs, not on the CPU"),
        ("cuda", Process("cpu"), "encodes images on the CPU, not on cuda; set VTPRUNE_DEVICE to auto"),
        ("cuda:0", Process("cpu"), "encodes images on the CPU, not on cuda:0; set VTPRUNE_DEVICE to auto"),
        ("cuda:8", EIGHT, "cuda:8 does not exist: this process sees 8 GPUs; set VTPRUNE_DEVICE to auto or another"),
    ],
)
def test_a_device_that_vllm_s_code_does_not_run_on_is_refused(asked: str, process: Process, problem: str) -> None:
    with pytest.raises(EncoderError, match=problem):
        device_for(asked, process)


@pytest.mark.parametrize("asked", ["auto", "cpu", "cuda", "cuda:0"])
@pytest.mark.parametrize(
    ("process", "problem"),
    [
        (Process("cuda"), "this process sees no GPU"),
        (Process("cuda", ray=True), "this process sees no GPU"),
        (Process("rocm"), "this process sees no GPU"),
        (Process("xpu"), "platform 'xpu'"),
        (Process("tpu"), "platform 'tpu'"),
        (Process("unspecified"), "platform 'unspecified'; expected .* or vLLM's CPU build"),  # its GPU build, no GPU
    ],
)
def test_without_a_gpu_or_the_cpu_build_no_device_will_do(asked: str, process: Process, problem: str) -> None:
    with pytest.raises(EncoderError, match=problem) as error:
        device_for(asked, process)
    assert "VTPRUNE_DEVICE" not in str(error.value), "no value of it helps"


@pytest.mark.parametrize(
    ("process", "processes", "asked", "most"),
    [
        (ONE_GPU, 1, "auto", 1),
        (ONE_GPU, 4, "auto", 4),
        (ONE_GPU, 0, "auto", 0),  # headless
        (replace(EIGHT, engines=8), 8, "auto", 1),
        (replace(EIGHT, engines=2), 8, "auto", 4),
        (replace(EIGHT, engines=2), 3, "auto", 2),
        (replace(EIGHT, gpus=4), 2, "cuda:3", 2),
        (replace(EIGHT, gpus=4), 2, "cuda:4", 0),  # a GPU without an engine
        (replace(EIGHT, assigned=(4, 5), gpus=2), 1, "cuda:5", 1),
        (replace(EIGHT, assigned=(4, 5), gpus=2), 1, "cuda:0", 0),
        (replace(EIGHT, ray=True), 1, "cuda:6", 1),  # it may have one
        (UNKNOWN, 1, "auto", 1),
        (Process("cpu"), 2, "auto", 0),
    ],
)
def test_how_many_share_a_gpu_with_an_engine(process: Process, processes: int, asked: str, most: int) -> None:
    ranks = [replace(process, rank=rank) for rank in range(processes)]
    for shared in (False, True):
        places = encoder_places(asked, ranks, shared=shared)
        beside_engines = [place for place in places if place.with_engine]
        assert max((place.clients if shared else place.processes for place in beside_engines), default=0) == most
        assert all((place.processes if shared else place.clients) == 1 for place in places)


def test_one_encoder_process_on_each_device_serves_the_api_processes_of_its_engines() -> None:
    ranks = [replace(EIGHT, engines=2, gpus=4, rank=rank) for rank in range(5)]
    assert encoder_places("auto", ranks, shared=True) == [
        EncoderPlace("cuda:0", True, processes=1, clients=3),
        EncoderPlace("cuda:4", True, processes=1, clients=2),
    ]
    assert encoder_places(
        "cuda:7", [replace(ONE_GPU, visible=EIGHT.visible, rank=rank) for rank in range(2)], shared=True
    )
    assert encoder_places("auto", [Process("cpu", rank=rank) for rank in range(3)], shared=True) == [
        EncoderPlace("cpu", clients=3)
    ]


def test_an_encoder_process_holds_the_weights_once_and_plans_for_each_client() -> None:
    three = QWEN.for_clients(3)
    assert (three.weights, three.encoding, three.held) == (QWEN.weights, QWEN.encoding, QWEN.held)
    assert three.selection == 3 * QWEN.selection
    assert three.least == QWEN.least
    assert QWEN.total < three.total < 3 * QWEN.total


# --- How much -----------------------------------------------------------------------------------------------------


LLAVA_7B = Shape(parameters=312_000_000, hidden=1024, intermediate=4096, values=588, width=4096)
QWEN_7B = Shape(parameters=676_500_000, hidden=1280, intermediate=3420, values=1176, width=3584, merge=2)
LLAVA, QWEN = (
    footprint(shape, torch.bfloat16, tokens=tokens, batch=8, held=0)
    for shape, tokens in ((LLAVA_7B, 576), (QWEN_7B, 16384))
)


@pytest.mark.parametrize(
    ("need", "processes", "card", "gib", "warned"),
    [
        (LLAVA, 1, 16, 1.5, False),
        (LLAVA, 1, 24, 1.5, False),
        (LLAVA, 1, 80, 1.5, False),
        (LLAVA, 4, 80, 5.98, False),
        (LLAVA, 4, 24, 5.83, True),  # what they need at least
        (LLAVA, 8, 80, 11.65, True),
        (QWEN, 1, 141, 7.86, False),
        (QWEN, 1, 80, 7.86, False),
        (QWEN, 1, 24, 2.4, True),  # a tenth of the GPU
        (QWEN, 1, 16, 2.14, True),
        (QWEN, 4, 80, 8.54, True),
    ],
)
def test_what_is_reserved(need: Footprint, processes: int, card: int, gib: float, warned: bool) -> None:
    reservation = reserve(need, processes=processes, card=card * GIB)
    assert reservation.gib == pytest.approx(gib, rel=0.01)
    assert bool(reservation.warning) is warned
    assert not warned or f"Set --mm-ipc-gpu-memory-gb to {in_gib(processes * need.total)}" in reservation.warning


def in_gib(size: int) -> str:
    return f"{ceil(size / GIB * 100) / 100:g}"


def test_what_is_given_is_kept_where_it_holds_the_encoders() -> None:
    assert reserve(QWEN, processes=1, card=24 * GIB, operator_gib=20.0) == Reservation(20.0)
    few = reserve(QWEN, processes=1, card=80 * GIB, operator_gib=3.0)
    assert few.gib == 3.0
    assert "--mm-ipc-gpu-memory-gb=3 reserves less" in few.warning
    assert f"Set --mm-ipc-gpu-memory-gb to {in_gib(QWEN.total)}" in few.warning


@pytest.mark.parametrize(("gib", "processes"), [(0.0, 1), (1.0, 1), (3.0, 4)])
def test_what_does_not_hold_the_weights_is_refused_with_both_numbers(gib: float, processes: int) -> None:
    least, most = in_gib(processes * LLAVA.least), in_gib(processes * LLAVA.total)
    problem = f"--mm-ipc-gpu-memory-gb={gib:g} does not hold .*; expected {least} or more, and {most} for the largest"
    with pytest.raises(EncoderError, match=problem):
        reserve(LLAVA, processes=processes, card=80 * GIB, operator_gib=gib)


def test_torch_may_allocate_what_the_context_leaves() -> None:
    assert allocator_fraction(CONTEXT + 8 * GIB, 80 * GIB) == pytest.approx(0.1)
    assert allocator_fraction(200 * GIB, 80 * GIB) == 1.0


def test_what_stays_on_the_gpu_counts() -> None:
    parts: Sequence[str] = ("encoding", "selection", "held")
    for part in parts:
        assert replace(QWEN, **{part: getattr(QWEN, part) + GIB}).total == pytest.approx(
            QWEN.total + 1.1 * GIB, rel=0.01
        )
