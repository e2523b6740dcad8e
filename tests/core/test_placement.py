"""Where an API process encodes, and how much memory is reserved for it on a GPU."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import InternVLConfig, LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

from vllm_vtprune.footprint import footprint
from vllm_vtprune.placement import (
    CONTEXT,
    GIB,
    Footprint,
    Process,
    Reservation,
    allocator_fraction,
    device_for,
    most_on_one_gpu,
    reserve,
)
from vllm_vtprune.towers.base import load_tower
from vllm_vtprune.towers.weights import TowerError

ONE = Process("cuda", visible=(0,))
EIGHT = Process("cuda", visible=tuple(range(8)))
UNKNOWN = Process("cuda", visible=(0, 1), gpus=None)  # of vllm.LLM

# --- Where --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "device"),
    [
        (ONE, "cuda:0"),
        (Process("rocm", visible=(0,)), "cuda:0"),
        (Process("cpu"), "cpu"),
        (replace(EIGHT, gpus=4), "cuda:0"),  # tensor parallel
        *((replace(EIGHT, engines=8, rank=rank), f"cuda:{rank}") for rank in (0, 1, 7)),  # data parallel
        *((replace(EIGHT, engines=2, gpus=4, rank=rank), f"cuda:{4 * (rank % 2)}") for rank in range(4)),
        *((replace(ONE, rank=rank), "cuda:0") for rank in range(3)),  # more API processes than engines
        (replace(EIGHT, engines=2, rank=3), "cuda:1"),  # half of the engines are on another machine
        (replace(EIGHT, first_engine=3), "cuda:3"),  # one of several servers of this machine
        (replace(EIGHT, assigned=(4, 5)), "cuda:4"),
        (replace(EIGHT, assigned=(4, 5), engines=2, rank=1), "cuda:5"),
        (Process("cuda", visible=(2, 3), assigned=(3,)), "cuda:1"),  # CUDA_VISIBLE_DEVICES=2,3 and a choice of them
        (Process("cuda", visible=(2, 3)), "cuda:0"),
        (replace(ONE, ray=True), "cuda:0"),
        (replace(EIGHT, ray=True, gpus=16), "cuda:0"),  # over two machines
        (replace(EIGHT, ray=True, engines=2, gpus=4, rank=1), "cuda:4"),
        (UNKNOWN, "cuda:0"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_process_encodes_where_its_engine_is(asked: str, process: Process, device: str) -> None:
    if device == "cpu":
        assert device_for(asked, process) == {"auto": "cpu", "cuda": "cuda"}[asked], (
            "a GPU that is not there is refused"
        )
    else:
        assert device_for(asked, process) == device


@pytest.mark.parametrize(
    ("process", "problem", "answer"),
    [
        (Process("cuda"), "this process sees no GPU", "cpu"),  # an actor of Ray without a GPU
        (Process("cuda", ray=True), "this process sees no GPU", "cpu"),
        (Process("rocm"), "this process sees no GPU", "cpu"),
        (Process("xpu"), "images cannot be encoded on the platform xpu", "cpu"),
        (Process("tpu"), "images cannot be encoded on the platform tpu", "cpu"),
        (replace(EIGHT, engines=0), "no engine runs on this machine", "cuda:INDEX"),  # API processes alone
        (replace(EIGHT, ray=True), "Ray chose which of the 8 visible GPUs", "cuda:INDEX"),
        (replace(ONE, assigned=(4, 5)), "GPU 4 of engine 0 is not visible", "cuda:INDEX"),
        (replace(ONE, first_engine=1), "GPU 1 of engine 1 is not visible", "cuda:INDEX"),
        (replace(UNKNOWN, first_engine=1), "this is data-parallel rank 1", "cuda:INDEX"),
    ],
)
def test_where_nobody_can_tell_it_is_asked_for(process: Process, problem: str, answer: str) -> None:
    with pytest.raises(TowerError, match=f"{problem}.*; set VTPRUNE_DEVICE to {answer}"):
        device_for("auto", process)
    assert device_for("cpu", process) == "cpu"
    assert device_for("cuda:3", process) == "cuda:3"


@pytest.mark.parametrize(
    ("process", "processes", "asked", "most"),
    [
        (ONE, 1, "auto", 1),
        (ONE, 4, "auto", 4),
        (ONE, 0, "auto", 0),  # headless
        (replace(EIGHT, engines=8), 8, "auto", 1),
        (replace(EIGHT, engines=2), 8, "auto", 4),
        (replace(EIGHT, engines=2), 3, "auto", 2),
        (replace(EIGHT, gpus=4), 2, "cpu", 0),
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
    assert most_on_one_gpu(asked, [replace(process, rank=rank) for rank in range(processes)]) == most


# --- How much -----------------------------------------------------------------------------------------------------


def config_of(architecture: str, *, depth: int | None = None, part: int = 1) -> Any:
    """Of LLaVA-1.5-7B, LLaVA-NeXT with its language model, InternVL3-8B or Qwen2.5-VL-7B, with a small language model.

    Args:
        architecture: of the model.
        depth: of the encoder; None for its own.
        part: by what its widths are divided.
    """
    small = dict(intermediate_size=64, num_hidden_layers=1, vocab_size=64, bos_token_id=1, eos_token_id=2)
    llama = dict(model_type="llama", hidden_size=4096 // part, num_attention_heads=32 // part, **small)
    qwen = dict(hidden_size=3584 // part, num_attention_heads=28 // part, num_key_value_heads=28 // part, **small)
    vision_transformer = dict(
        hidden_size=1024 // part,
        intermediate_size=4096 // part,
        num_attention_heads=16 // part,
        num_hidden_layers=depth or 24,
        patch_size=14,
    )
    clip = dict(model_type="clip_vision_model", image_size=336, **vision_transformer)
    match architecture:
        case "LlavaForConditionalGeneration":
            return LlavaConfig(vision_config=clip, text_config=llama)
        case "LlavaNextForConditionalGeneration":
            return LlavaNextConfig(vision_config=clip, text_config=llama)
        case "InternVLForConditionalGeneration":
            intern = dict(image_size=448, **vision_transformer)
            return InternVLConfig(vision_config=intern, text_config=dict(model_type="qwen2", **qwen))
    layers = depth or 32
    vision = dict(
        hidden_size=1280 // part,
        intermediate_size=3420 // part,
        depth=layers,
        num_heads=16 // part,
        out_hidden_size=3584 // part,
        fullatt_block_indexes=[layers - 1],
    )
    return Qwen2_5_VLConfig(vision_config=vision, text_config=qwen)


def need_of(architecture: str, tokens: int) -> Footprint:
    return footprint(architecture, config_of(architecture), torch.bfloat16, tokens=tokens, batch=8, held=0)


LLAVA = need_of("LlavaForConditionalGeneration", 576)
QWEN = need_of("Qwen2_5_VLForConditionalGeneration", 16384)


def test_weights_are_those_of_the_released_models() -> None:
    assert LLAVA.weights / 1e6 == pytest.approx(624, abs=1)
    assert QWEN.weights / 1e6 == pytest.approx(1353, abs=2)


class Held(TorchDispatchMode):
    """The most bytes that results of torch's operations hold at a time. Their insides are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._now)
        return results

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def images(architecture: str, count: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Images of equal size, and how many tokens each has."""
    match architecture:
        case "LlavaForConditionalGeneration":
            return [{"pixel_values": torch.zeros(3, 336, 336)}] * count, 576
        case "LlavaNextForConditionalGeneration":
            pixels = torch.zeros(5, 3, 336, 336)
            return [{"pixel_values": pixels, "image_sizes": torch.tensor([672, 672])}] * count, 5 * 576
        case "InternVLForConditionalGeneration":
            return [{"pixel_values": torch.zeros(5, 3, 448, 448), "tile_grid": torch.tensor([2, 2])}] * count, 5 * 256
    return [{"pixel_values": torch.zeros(1024, 1176), "image_grid_thw": torch.tensor([1, 32, 32])}] * count, 256


@pytest.mark.parametrize(
    ("architecture", "count", "dtype"),
    [
        ("LlavaForConditionalGeneration", 2, torch.float32),
        ("LlavaForConditionalGeneration", 2, torch.bfloat16),
        ("LlavaNextForConditionalGeneration", 1, torch.bfloat16),
        ("InternVLForConditionalGeneration", 1, torch.bfloat16),
        ("Qwen2_5_VLForConditionalGeneration", 2, torch.float32),
        ("Qwen2_5_VLForConditionalGeneration", 2, torch.bfloat16),
    ],
)
def test_a_tower_allocates_what_is_expected_of_it(architecture: str, count: int, dtype: torch.dtype) -> None:
    """All widths are a quarter of the real ones; depth does not matter, as layers come one after the other."""
    config = config_of(architecture, depth=2, part=4)
    tower = load_tower(Path(), architecture=architecture, hf_config=config, dtype=dtype, load_format="dummy")
    batch, tokens = images(architecture, count)
    with Held() as held:
        tower.encode(batch)
    need = footprint(architecture, config, dtype, tokens=tokens, batch=count, held=0)
    assert need.weights == tower.nbytes
    assert held.most <= need.encoding <= 1.4 * held.most


@pytest.mark.parametrize(
    ("need", "processes", "card", "gib", "warned"),
    [
        (LLAVA, 1, 16, 1.49, False),
        (LLAVA, 1, 24, 1.49, False),
        (LLAVA, 1, 80, 1.49, False),
        (LLAVA, 4, 80, 5.93, False),
        (LLAVA, 4, 24, 5.83, True),  # what they need at least
        (LLAVA, 8, 80, 11.65, True),
        (LLAVA, 0, 80, 0.0, False),
        (QWEN, 1, 141, 7.48, False),
        (QWEN, 1, 80, 7.48, False),
        (QWEN, 1, 24, 2.4, True),  # a tenth of the GPU
        (QWEN, 1, 16, 2.14, True),
        (QWEN, 4, 80, 8.54, True),
    ],
)
def test_what_is_reserved(need: Footprint, processes: int, card: int, gib: float, warned: bool) -> None:
    found = reserve(need, processes=processes, card=card * GIB)
    assert found.gib == pytest.approx(gib, rel=0.01)
    assert bool(found.warning) is warned
    assert not warned or f"Give --mm-ipc-gpu-memory-gb {in_gib(processes * need.total)}" in found.warning


def in_gib(size: int) -> str:
    return f"{ceil(size / GIB * 100) / 100:g}"


def test_what_is_given_is_kept_where_it_holds_the_encoders() -> None:
    assert reserve(QWEN, processes=1, card=24 * GIB, given=20.0) == Reservation(20.0)
    few = reserve(QWEN, processes=1, card=80 * GIB, given=3.0)
    assert few.gib == 3.0
    assert "--mm-ipc-gpu-memory-gb=3 reserves less" in few.warning
    assert f"Give --mm-ipc-gpu-memory-gb {in_gib(QWEN.total)}" in few.warning


@pytest.mark.parametrize(("given", "processes"), [(0.0, 1), (1.0, 1), (3.0, 4)])
def test_what_does_not_hold_the_weights_is_refused_with_both_numbers(given: float, processes: int) -> None:
    least, most = in_gib(processes * LLAVA.least), in_gib(processes * LLAVA.total)
    problem = f"--mm-ipc-gpu-memory-gb={given:g} does not hold .*; expected {least} or more, and {most} for the largest"
    with pytest.raises(TowerError, match=problem):
        reserve(LLAVA, processes=processes, card=80 * GIB, given=given)


def test_torch_may_allocate_what_the_context_leaves() -> None:
    assert allocator_fraction(CONTEXT + 8 * GIB, 80 * GIB) == pytest.approx(0.1)
    assert allocator_fraction(200 * GIB, 80 * GIB) == 1.0


def test_what_stays_on_the_gpu_counts() -> None:
    parts: Sequence[str] = ("encoding", "selection", "held")
    for part in parts:
        assert replace(QWEN, **{part: getattr(QWEN, part) + GIB}).total == pytest.approx(
            QWEN.total + 1.1 * GIB, rel=0.01
        )
