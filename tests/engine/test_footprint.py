"""GPU memory of a vision encoder, worked out from a config, against what vLLM's encoder allocates on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.support.held import Held
from tests.support.processors import config_of
from vllm_vtprune.plugin.gpu import footprint_of
from vllm_vtprune.plugin.image import preprocess
from vllm_vtprune_checkpoints.glm4v import write_glm4v_checkpoint
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint
from vllm_vtprune_checkpoints.mistral3 import write_mistral3_checkpoint
from vllm_vtprune_checkpoints.qwen2_5_vl import write_qwen2_5_vl_checkpoint
from vllm_vtprune_checkpoints.qwen3_vl import write_qwen3_vl_checkpoint

DEPTH = 2  # layers come one after the other, so more of them take no more memory at a time


@pytest.mark.parametrize(
    ("write", "shapes", "count", "dtype"),
    [
        (write_llava_checkpoint, "7b", 2, "bfloat16"),
        pytest.param(write_llava_next_checkpoint, "7b", 1, "bfloat16", marks=pytest.mark.verify),
        pytest.param(write_internvl_checkpoint, "1b", 1, "bfloat16", marks=pytest.mark.verify),
        pytest.param(write_glm4v_checkpoint, "released", 2, "bfloat16", marks=pytest.mark.verify),
        pytest.param(write_mistral3_checkpoint, "24b", 2, "bfloat16", marks=pytest.mark.verify),
        pytest.param(write_qwen2_5_vl_checkpoint, "3b", 2, "float32", marks=pytest.mark.verify),
        (write_qwen3_vl_checkpoint, "4b", 2, "bfloat16"),
    ],
)
def test_an_encoder_allocates_what_is_expected_of_it(
    write: Callable[..., Path], shapes: str, count: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPRUNE_LOAD_FORMAT", "dummy")
    checkpoint = write(tmp_path, size=shapes, weights=False, dtype=dtype)
    config = json.loads((checkpoint / "config.json").read_text())
    vision = config["vision_config"]
    vision |= {name: DEPTH for name in ("num_hidden_layers", "depth") if name in vision}
    indexes = ("fullatt_block_indexes", "deepstack_visual_indexes")
    vision |= {name: [*range(DEPTH)] for name in indexes if name in vision}
    (checkpoint / "config.json").write_text(json.dumps(config))
    model_config = config_of(checkpoint, dtype=dtype)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    images = [preprocess(processor, Image.new("RGB", (672, 672), "gray")) for _ in range(count)]
    encoder = processor.runtime.local.vision_encoder
    with Held() as held:
        features = encoder.encode(images)
    need = footprint_of(model_config, processor.family, features[0].num_tokens)
    layer = need.weights / DEPTH
    assert encoder.nbytes <= need.weights <= encoder.nbytes + layer, "of LLaVA, the last layer is not used"
    assert held.peak <= need.encoding, "for fewer images than may be encoded together"
    alone = need.encoding * sum(image.layout.patches for image in images) / 16_384
    assert alone <= 2 * held.peak
