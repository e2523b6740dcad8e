"""Mistral-Small-3.1 checkpoints, laid out like `mistralai/Mistral-Small-3.1-24B-Instruct-2503` for transformers.

Pixtral's vision encoder, which takes images of any aspect ratio, a merger of 2 x 2 patches, and a prompt with a token
after each row of an image.
"""

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from vllm_vtprune_checkpoints.llava import BOS, EOS, FIRST_TOKENS
from vllm_vtprune_checkpoints.tokens import chat_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import INSIDE, Checkpoint, Writer, even_weight, widths

PATCH_SIZE = 14
ACROSS = 2  # patches of a token, in either direction

SPECIAL_TOKENS = "[INST] [/INST] [IMG] <pad> [IMG_BREAK] [IMG_END] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]".split()
TOKEN_ID = ids_of(SPECIAL_TOKENS)

IMAGE_SIZE = {"tiny": 336, "24b": 1540}
"""Most pixels of an image's longer edge; 28 x 28 make a token."""

VISION = {"tiny": widths(128, 256, 4, 4), "24b": widths(1024, 4096, 24, 16)}
TEXT = {
    "tiny": widths(256, 512, 2, 4, 2, 2304, 131_072, head_dim=64),
    "24b": widths(5120, 32_768, 40, 32, 8, 131_072, 131_072, head_dim=128),
}


def mistral3(size: str) -> Checkpoint:
    """What a checkpoint holds; `size`: "tiny" (3 million parameters) or "24b" (of Mistral-Small-3.1-24B)."""
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(
            image_size=IMAGE_SIZE[size],
            patch_size=PATCH_SIZE,
            hidden_act="silu",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **VISION[size],
        ),
        text_config=MistralConfig(
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e9},
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=TOKEN_ID["<pad>"],
            tie_word_embeddings=False,
            **TEXT[size],
        ),
        image_token_index=TOKEN_ID["[IMG]"],
        spatial_merge_size=ACROSS,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": IMAGE_SIZE[size]}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}
        ),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, first=FIRST_TOKENS, bos=BOS, eos=EOS, pad="<pad>", max_length=131_072),
        patch_size=PATCH_SIZE,
        spatial_merge_size=ACROSS,
        chat_template=chat_template(  # the released form, but for the system turn that it gives a prompt without
            before="{{- bos_token -}}\n",
            start="{'system': '[SYSTEM_PROMPT]', 'user': '[INST]', 'assistant': ''}[message['role']]",
            end="{'system': '[/SYSTEM_PROMPT]', 'user': '[/INST]', 'assistant': eos_token}[message['role']]",
            prompt="",
            image="[IMG]",
        ),
    )
    return Checkpoint(Mistral3ForConditionalGeneration, config, processor, INSIDE, weight=even_weight)


write_mistral3_checkpoint = Writer(mistral3, TEXT)
