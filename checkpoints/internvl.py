"""InternVL checkpoints made on the spot, laid out like `OpenGVLab/InternVL3-1B-hf`. See `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights; "1b" has the shapes of
InternVL3-1B for vLLM's `load_format="dummy"`, with the token ids of our tokenizer. Weights come under the released
names ("vllm") or those of transformers' modules ("module").
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from vllm_vtprune_checkpoints.chatml import END, END_OF_TEXT, START, chat_template, chatml_tokenizer
from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, DType, random_weight
from vllm_vtprune_checkpoints.weights import renamed, write_weights

Size = Literal["tiny", "1b"]
Naming = Literal["vllm", "module"]

PATCH_SIZE = 14
ACROSS = 2  # patches of a token, in either direction
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL_TOKENS = (END_OF_TEXT, START, END, *NAMED_TOKENS.values())
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
    "1b": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2304,
        max_position_embeddings=16_384,
    ),
    "1b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_674,
        max_position_embeddings=32_768,
    ),
}

RENAMES: dict[Naming, tuple[tuple[str, str], ...]] = {
    "vllm": (
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "module": (),
}


def write_internvl_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    image_size: int = 448,
    naming: Naming = "vllm",
    weights: bool = True,
    qk_norm: bool = False,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write an InternVL checkpoint into `directory` and return its path.

    Args:
        image_size: pixels of a tile's side; a smaller one than the released 448 has fewer tokens, for tests.
        qk_norm: with the norms and without the biases of the large encoder (6B).
        size, naming: see above.
        weights, seed, shards, dtype: as for `write_llava_checkpoint`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = internvl_config(size, image_size, dtype, qk_norm=qk_norm)
    config.save_pretrained(directory)
    ends = [TOKEN_ID[END], TOKEN_ID[END_OF_TEXT]]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(directory)
    square = {"height": image_size, "width": image_size}
    image_processor = GotOcr2ImageProcessor(size=square, image_mean=MEAN, image_std=STD, crop_to_patches=True)
    video_processor = InternVLVideoProcessor(size=square, image_mean=MEAN, image_std=STD)
    InternVLProcessor(
        image_processor=image_processor,
        tokenizer=chatml_tokenizer(SPECIAL_TOKENS, max_length=16_384, named_tokens=NAMED_TOKENS),
        video_processor=video_processor,
        image_seq_length=config.image_seq_length,
        # the released template, with what vLLM takes for an image
        chat_template=chat_template(image="<IMG_CONTEXT>\\n", video="<video>\\n"),
    ).save_pretrained(directory)
    for processor in (image_processor, video_processor):
        processor.save_pretrained(directory)  # released ones have a file for each, transformers 5 has one for all
    if weights:
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
        write_weights(
            directory,
            {name: tuple(weight.shape) for name, weight in model.state_dict().items()},
            rename=lambda name: renamed(name, RENAMES[naming]),
            weight=lambda name, shape: random_weight(name, shape, seed),
            shards=shards,
            dtype=getattr(torch, dtype),
        )
    return directory


def internvl_config(
    size: Size, image_size: int = 448, dtype: DType = "float32", *, qk_norm: bool = False
) -> InternVLConfig:
    """The configuration of InternVL in a size; the other arguments as for `write_internvl_checkpoint`."""
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config=InternVLVisionConfig(
            image_size=[image_size, image_size],
            patch_size=[PATCH_SIZE, PATCH_SIZE],
            attention_bias=not qk_norm,
            use_qk_norm=qk_norm,
            norm_type="rms_norm" if qk_norm else "layer_norm",
            **VISION[size],
        ),
        text_config=Qwen2Config(
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            tie_word_embeddings=False,
            **TEXT[size],
        ),
        image_token_id=TOKEN_ID["<IMG_CONTEXT>"],
        image_seq_length=(image_size // PATCH_SIZE // ACROSS) ** 2,
        downsample_ratio=1 / ACROSS,
        tie_word_embeddings=False,
        dtype=dtype,
    )
