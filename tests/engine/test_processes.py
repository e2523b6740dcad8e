"""Which process does what: only the frontend encodes images to prune, the engine's processes stay stock."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import WeightTransferConfig

from tests.support.engines import Ask, Engine, ask_about, assert_same
from tests.support.images import sample_images
from tests.support.processes import state
from vllm_vtprune.plugin.compat import refuse_unsupported

pytestmark = pytest.mark.engine

VISION = "vllm_vtprune.plugin.vision"
PLUGIN = "vllm_vtprune.plugin.families.llava"


def test_the_engines_processes_never_load_the_encoder(cached: Engine) -> None:
    for image in sample_images(2, stamp="processes"):
        cached.ask(Ask(ask_about("What is it?"), [image], {"budget": {"type": "tokens", "keep": 32}}))
    frontend = state()
    assert frontend["vision_encoders"] >= 1
    assert VISION in frontend["modules"]

    (core,) = cached.llm.collective_rpc("engine_core_state")
    (worker,) = cached.llm.collective_rpc("worker_state")
    assert len({frontend["pid"], core["pid"], worker["pid"]}) == 3
    assert worker["model_class"] == f"{PLUGIN}.PrunedLlavaForConditionalGeneration"
    for process in (core, worker):
        assert PLUGIN in process["modules"]
        assert VISION not in process["modules"]
        assert process["vision_encoders"] == 0


def test_profiling_measures_the_stock_encoder(cached: Engine) -> None:
    dummy = cached.processor.get_dummy_mm_inputs(mm_counts={"image": 2})
    assert [tuple(item["pixel_values"].data.shape) for item in dummy["mm_kwargs"]["image"]] == [(3, 336, 336)] * 2
    assert [placeholder.get_num_embeds() for placeholder in dummy["mm_placeholders"]["image"]] == [576, 576]


def test_requests_at_the_same_time_answer_as_one_by_one(cached: Engine, uncached: Engine) -> None:
    image_a, image_b, image_c = sample_images(3, stamp="together")
    tokens = {"budget": {"type": "tokens", "keep": 48}}
    requests = [
        Ask(ask_about("Where is the bus?"), [image_a], tokens),
        Ask(ask_about("Where is the bus?"), [image_a], False),
        Ask(ask_about("Where is the dog?"), [image_a], {"budget": {"type": "energy", "threshold": 0.95}}),
        Ask(ask_about("Why?", images=0)),
        Ask(ask_about("Where is the bus?"), [image_b], {"method": "uniform", "budget": {"type": "ratio", "keep": 0.5}}),
        Ask(ask_about("Compare them.", images=2), [image_b, image_c], {"images": [False, tokens]}),
        Ask(ask_about("Where is the bus?"), [image_c]),
        Ask(
            ask_about("Compare them.", images=3),
            [image_c, image_b, image_a],
            {"images": [tokens, {"method": "random"}, False]},
        ),
    ]
    for answer, request in zip(cached.ask_together(requests), requests, strict=True):
        assert_same(answer, uncached.ask(request))


def engine_config(
    graphs: bool = False,
    lora: Any = None,
    rate: float | None = None,
    video: str | None = None,
    transfer: WeightTransferConfig | None = None,
) -> Any:
    multimodal = SimpleNamespace(
        video_pruning_rate=rate,
        use_gpu_video_backend=lambda: video is not None,
        media_io_kwargs={"video": {"backend": video}} if video else {},
    )
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=graphs),
        lora_config=lora,
        weight_transfer_config=transfer,
        model_config=SimpleNamespace(multimodal_config=multimodal),
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"graphs": True}, "cudagraph_mm_encoder=True"),
        ({"lora": SimpleNamespace(enable_tower_connector_lora=True)}, "enable_tower_connector_lora=True"),
        ({"rate": 0.5}, "video_pruning_rate=0.5"),
        ({"transfer": WeightTransferConfig()}, "weight_transfer_config.backend=nccl"),
        ({"video": "pynvvideocodec"}, "media_io_kwargs.video.backend=pynvvideocodec"),
    ],
)
def test_options_that_would_bypass_pruned_embeddings_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^[a-z_.]*{name} cannot be combined with vllm-vtprune"):
        refuse_unsupported(engine_config(**options))


@pytest.mark.parametrize("lora", [None, SimpleNamespace(enable_tower_connector_lora=False)])
@pytest.mark.parametrize("rate", [None, 0.0])
def test_other_options_are_not_refused(lora: Any, rate: float | None) -> None:
    refuse_unsupported(engine_config(lora=lora, rate=rate))
