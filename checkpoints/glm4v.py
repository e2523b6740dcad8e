"""GLM-4.1V and GLM-4.5V checkpoints, laid out like `zai-org/GLM-4.1V-9B-Thinking` and `zai-org/GLM-4.5V`.

A vision encoder with learned positions that are interpolated, a convolution that makes one token of 2 x 2 patches, and
positions of three numbers. Weights have the names of transformers' modules, but each expert's lie apart.
"""

from collections.abc import Mapping
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
)

from vllm_vtprune_checkpoints.tokens import chat_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, even_weight, widths

SPECIAL_TOKENS = (
    "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|begin_of_image|> <|end_of_image|> "
    "<|begin_of_video|> <|end_of_video|> <|image|> <|video|>"
).split()
TOKEN_ID = ids_of(SPECIAL_TOKENS)

PIXELS = {"tiny": (112 * 112, 2 * 336 * 336), "released": (112 * 112, 9_633_792)}
"""Fewest and most pixels of an image after it was resized, which count twice; 28 x 28 make a token."""

VISION = {
    "tiny": dict(depth=4, hidden_size=128, num_heads=4, image_size=112),
    "released": dict(depth=24, hidden_size=1536, num_heads=12, image_size=336),
}
TEXT = {
    "tiny": widths(256, 512, 2, 4, 2, 2304, 32_768),
    "released": widths(4096, 13_696, 40, 32, 2, 151_552, 65_536),
}
EXPERTS = {
    "tiny": dict(head_dim=64, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2),
    "released": widths(
        4096, 10_944, 46, 96, 8, head_dim=128, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8
    ),
}
"""What a mixture of experts has instead."""

MROPE_SECTION = {"tiny": [4, 6, 6], "released": [8, 12, 12]}  # of a quarter of a head


def glm4v(size: str, *, moe: bool = False) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" (3 million parameters) or "released" (the shapes of GLM-4.1V-9B, with `moe` of GLM-4.5V, 106B).
        moe: of GLM-4.5V, with experts.
    """
    text: dict[str, Any] = TEXT[size] | (dict(use_qk_norm=False) | EXPERTS[size] if moe else {})
    config = (Glm4vMoeConfig if moe else Glm4vConfig)(
        vision_config=dict(
            out_hidden_size=text["hidden_size"], intermediate_size=text["intermediate_size"], **VISION[size]
        ),
        text_config=dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, mrope_section=MROPE_SECTION[size], partial_rotary_factor=0.5
            ),
            eos_token_id=[TOKEN_ID["<|endoftext|>"], TOKEN_ID["<|user|>"], TOKEN_ID["<|observation|>"]],
            pad_token_id=TOKEN_ID["<|endoftext|>"],
            attention_bias=True,  # vLLM asks for it; transformers has the biases of GLM-4.1V in any case
            **text,
        ),
        image_token_id=TOKEN_ID["<|image|>"],
        video_token_id=TOKEN_ID["<|video|>"],
        image_start_token_id=TOKEN_ID["<|begin_of_image|>"],
        image_end_token_id=TOKEN_ID["<|end_of_image|>"],
        video_start_token_id=TOKEN_ID["<|begin_of_video|>"],
        video_end_token_id=TOKEN_ID["<|end_of_video|>"],
    )
    limits = dict(zip(("shortest_edge", "longest_edge"), PIXELS[size], strict=True))
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=limits),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, eos="<|user|>", max_length=65_536),
        video_processor=Glm4vVideoProcessor(size=limits),
        chat_template=chat_template(  # the form of zai-org/GLM-4.1V-9B-Thinking
            before="[gMASK]<sop>\n",
            start="'<|' + message['role'] + '|>\\n'",
            prompt="<|assistant|>\\n",
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
        ),
    )
    model = Glm4vMoeForConditionalGeneration if moe else Glm4vForConditionalGeneration
    return Checkpoint(model, config, processor, weight=even_weight, split=_experts_apart)


def _experts_apart(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    apart: dict[str, Shape] = {}
    for name, shape in shapes.items():
        module, _, weight = name.rpartition(".")
        if not module.endswith(".experts"):
            apart[name] = shape
            continue
        experts, rows, columns = shape
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2} if weight == "gate_up_proj" else {weight: rows}
        for expert in range(experts):
            apart |= {f"{module}.{expert}.{part}.weight": (part_rows, columns) for part, part_rows in parts.items()}
    return apart


write_glm4v_checkpoint = Writer(glm4v, TEXT)
