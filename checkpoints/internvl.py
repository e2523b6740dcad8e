"""InternVL checkpoints, laid out like `OpenGVLab/InternVL3-1B-hf`."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from vllm_vtprune_checkpoints.tokens import CHATML, CHATML_IDS, END_OF_TEXT, chatml_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import INSIDE, Checkpoint, Writer, widths

PATCH_SIZE = 14
ACROSS = 2  # patches of a token, in either direction
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL_TOKENS = (*CHATML, *NAMED_TOKENS.values())
TOKEN_ID = ids_of(SPECIAL_TOKENS)

VISION = {"tiny": widths(128, 256, 4, 4), "1b": widths(1024, 4096, 24, 16)}
TEXT = {"tiny": widths(256, 512, 2, 4, 2, 2304, 16_384), "1b": widths(896, 4864, 24, 14, 2, 151_674, 32_768)}


def internvl(size: str, *, image_size: int = 448, qk_norm: bool = False) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" (2 million parameters) or "1b" (the shapes of InternVL3-1B).
        image_size: pixels of a tile's side; a smaller one than the released 448 has fewer tokens, for tests.
        qk_norm: with the norms and without the biases of the large encoder (6B).
    """
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            image_size=[image_size, image_size],
            patch_size=[PATCH_SIZE, PATCH_SIZE],
            attention_bias=not qk_norm,
            use_qk_norm=qk_norm,
            norm_type="rms_norm" if qk_norm else "layer_norm",
            **VISION[size],
        ),
        text_config=qwen2(TEXT[size]),
        image_token_id=TOKEN_ID["<IMG_CONTEXT>"],
        image_seq_length=(image_size // PATCH_SIZE // ACROSS) ** 2,
        downsample_ratio=1 / ACROSS,
        tie_word_embeddings=False,
    )
    square = {"height": image_size, "width": image_size}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square, image_mean=MEAN, image_std=STD, crop_to_patches=True),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, max_length=16_384, named=NAMED_TOKENS),
        video_processor=InternVLVideoProcessor(size=square, image_mean=MEAN, image_std=STD),
        image_seq_length=config.image_seq_length,
        # the released template, with what vLLM takes for an image
        chat_template=chatml_template(image="<IMG_CONTEXT>\\n", video="<video>\\n"),
    )
    return Checkpoint(InternVLForConditionalGeneration, config, processor, INSIDE, ends=[END_OF_TEXT])


def qwen2(text: Mapping[str, Any], *, tied: bool = False) -> Qwen2Config:
    """The config of a language model of these dimensions; `tied`: its head is its table of embeddings."""
    return Qwen2Config(rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=tied, **CHATML_IDS, **text)


write_internvl_checkpoint = Writer(internvl, TEXT)
