"""LLaVA-NeXT checkpoints, laid out like `llava-hf/llava-v1.6-vicuna-7b-hf`."""

from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from vllm_vtprune_checkpoints.llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    NAMES,
    TEXT,
    VISION,
    llama,
    llava_tokenizer,
)
from vllm_vtprune_checkpoints.writing import Checkpoint, Writer

PATCH_SIZE = 14
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # heights and widths in squares


def llava_next(size: str, *, image_size: int = 336, feature_layer: int | list[int] = -2) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: as for `llava`; "7b" has the shapes of LLaVA-NeXT-7B (v1.6, vicuna).
        image_size: pixels of a square's side; a smaller one than the released 336 has fewer tokens, for tests.
        feature_layer: as for `llava`.
    """
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=PATCH_SIZE, **VISION[size]),
        # so that several images have room
        text_config=llama(size, max_position_embeddings=16384 if size == "tiny" else 4096),
        image_token_index=IMAGE_TOKEN_ID[size],
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        image_grid_pinpoints=[[rows * image_size, columns * image_size] for rows, columns in PINPOINTS],
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer=llava_tokenizer(IMAGE_TOKEN_ID[size]),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the CLS token
        chat_template=CHAT_TEMPLATE,
    )
    return Checkpoint(LlavaNextForConditionalGeneration, config, processor, NAMES)


write_llava_next_checkpoint = Writer(llava_next, TEXT)
