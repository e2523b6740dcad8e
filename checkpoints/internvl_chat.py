"""InternVL checkpoints in the layout of their authors, like `OpenGVLab/InternVL3-1B`.

The weights are those of `write_internvl_checkpoint` with the same size and seed, under other names and with the
queries, keys and values of a vision layer in one tensor. transformers has no classes for this layout: vLLM reads the
configuration by code that lies in the checkpoint, which takes ``trust_remote_code``, and processes images itself.
"""

from transformers import InternVLForConditionalGeneration

from vllm_vtprune_checkpoints.configuration_internvl_chat import InternVLChatConfig
from vllm_vtprune_checkpoints.internvl import ACROSS, PATCH_SIZE, TEXT, internvl
from vllm_vtprune_checkpoints.tokens import CHATML, END_OF_TEXT, chatml_template, make_tokenizer
from vllm_vtprune_checkpoints.writing import INSIDE, Checkpoint, Writer

IMAGE_SIZE = {"tiny": 112, "1b": 448}
"""Pixels of a tile's side."""

SPECIAL_TOKENS = (*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>")

NAMES = (
    (r"^model\.vision_tower\.", "vision_model."),
    (r"\.cls_token$", ".class_embedding"),
    (r"\.position_embeddings$", ".position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"\.encoder\.layer\.", ".encoder.layers."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qk])_norm\.", r".attn.\1_norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    *INSIDE,
)


def internvl_chat(size: str, *, qk_norm: bool = False) -> Checkpoint:
    """What a checkpoint holds; `size` ("tiny" has 16 tokens a tile) and `qk_norm` as for `internvl`."""
    image_size = IMAGE_SIZE[size]
    config = internvl(size, image_size=image_size, qk_norm=qk_norm).config
    vision = config.vision_config
    alike = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type", "hidden_act")
    InternVLChatConfig.register_for_auto_class()  # so that its code is saved too
    chat_config = InternVLChatConfig(
        architectures=["InternVLChatModel"],
        vision_config={
            "architectures": ["InternVisionModel"],
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "num_channels": 3,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "layer_norm_eps": vision.layer_norm_eps,
            "initializer_factor": 0.1,
            **{name: getattr(vision, name) for name in alike},
        },
        llm_config={**config.text_config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        select_layer=-1,
        force_image_size=image_size,
        downsample_ratio=1 / ACROSS,
        ps_version="v2",
        template="internvl2_5",
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        tie_word_embeddings=False,
    )
    tokenizer = make_tokenizer(SPECIAL_TOKENS, max_length=12_288)
    tokenizer.chat_template = chatml_template(image="<image>\\n", video="<video>\\n")
    return Checkpoint(
        InternVLForConditionalGeneration, chat_config, tokenizer, NAMES, model_config=config, ends=[END_OF_TEXT]
    )


write_internvl_chat_checkpoint = Writer(internvl_chat, TEXT)
