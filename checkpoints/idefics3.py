"""Idefics3 checkpoints, laid out like `HuggingFaceTB/SmolVLM-Instruct`: SigLIP on tiles and on the whole image."""

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
)

from vllm_vtprune_checkpoints.tokens import chat_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Writer, even_weight, widths

PATCH_SIZE = 14
TILE = {"tiny": 84, "2b": 384}  # pixels of a side
ACROSS = {"tiny": 2, "2b": 3}  # patches of a token, in either direction

BEGIN, END, PAD, IMAGE = "<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<image>"
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL_TOKENS = [BEGIN, END, PAD, IMAGE, "<fake_token_around_image>", "<global-img>", *PLACES]
TOKEN_ID = ids_of(SPECIAL_TOKENS)

VISION = {"tiny": widths(128, 256, 4, 4), "2b": widths(1152, 4304, 27, 16)}
TEXT = {"tiny": widths(256, 512, 2, 4, 2, 2304, 16_384), "2b": widths(2048, 8192, 24, 32, 32, 49_155, 16_384)}


def idefics3(size: str) -> Checkpoint:
    """What a checkpoint holds; `size`: "tiny" or "2b" (of SmolVLM)."""
    ids = dict(bos_token_id=TOKEN_ID[BEGIN], eos_token_id=TOKEN_ID[END], pad_token_id=TOKEN_ID[PAD])
    config = Idefics3Config(
        vision_config=dict(image_size=TILE[size], patch_size=PATCH_SIZE, **VISION[size]),
        text_config=LlamaConfig(**TEXT[size], **ids),
        scale_factor=ACROSS[size],
        image_token_id=TOKEN_ID[IMAGE],
        pad_token_id=TOKEN_ID[PAD],
        tie_word_embeddings=False,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 4 * TILE[size]}, max_image_size={"longest_edge": TILE[size]}
        ),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, eos=END, pad=PAD, max_length=16_384),
        image_seq_len=(TILE[size] // PATCH_SIZE // ACROSS[size]) ** 2,
        chat_template=chat_template(
            before="<|im_start|>",
            start="message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' else ': ')",
            end="'<end_of_utterance>\\n'",
            prompt="Assistant:",
            image=IMAGE,
        ),
    )
    return Checkpoint(Idefics3ForConditionalGeneration, config, processor, weight=even_weight)


write_idefics3_checkpoint = Writer(idefics3, TEXT)
