"""LLaVA checkpoints made on the spot, so that nothing has to be downloaded to run or test the server.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: a CLIP tower at 336 pixels (576
visual tokens and a CLS token), the projector and a LLaMA. Its answers mean nothing, but they depend on every visual
token, so it tells a correct path through the engine from a wrong one. The others are for measurements with vLLM's
`load_format="dummy"`: "7b" has the shapes of LLaVA-1.5-7B, "small" is just large enough that, on a CPU, prefill costs
much more than everything else.

The directories are laid out like `llava-hf/llava-1.5-7b-hf`. Weights come under one of three sets of names, because all
three exist: the released one, which vLLM 0.32 reads ("vllm"); what `save_pretrained` of transformers 5 writes for a new
model ("transformers"), which differs inside the vision tower; and the module names in transformers' memory ("module"),
which it writes with `save_original_format=False`. transformers reads all three.
"""

import copy
import hashlib
import inspect
import math
import os
import pkgutil
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vllm_vtprune_checkpoints import weights as weight_files
from vllm_vtprune_checkpoints import words
from vllm_vtprune_checkpoints.families import DEFAULT, FAMILIES
from vllm_vtprune_checkpoints.weights import noise, renamed, write_weights

Size = Literal["tiny", "small", "7b"]
Naming = Literal["vllm", "transformers", "module"]
DType = Literal["float32", "bfloat16"]

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, as in LLaMA
TRAINED_TOKENS = 2046  # enough for every word of the corpus to be one token

# The widths bound the rank of the features (128) and of the embeddings (256), so those are not smaller.
VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, projection_dim=128
    ),
    "small": dict(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, projection_dim=256
    ),
    "7b": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768
    ),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=2048),
    "small": dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=2048
    ),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
    ),
}
IMAGE_TOKEN_ID: dict[Size, int] = {"tiny": TRAINED_TOKENS, "small": TRAINED_TOKENS, "7b": 32000}

# From the module names to the names in the file.
RENAMES: dict[Naming, tuple[tuple[str, str], ...]] = {
    "vllm": (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "transformers": (
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "module": (),
}

# The form of llava-hf/llava-1.5-7b-hf: the images of a message first, then its text. vLLM sees from the loop over the
# content that messages come as lists of parts; plain strings are for other callers. `| string` keeps numbers harmless.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}
        {{- message['role'].upper() + ': ' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] + ' ' -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '<image>\\n' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] + ' ' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def write_llava_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    naming: Naming = "vllm",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
    siglip: bool = False,
) -> Path:
    """Write a LLaVA checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters), "small" (some 110 million) or "7b" (the shapes of LLaVA-1.5-7B; 13 GB in
            bfloat16 with weights).
        naming: The names of the weights in the file, see above.
        weights: Without, everything but the weights, for `load_format="dummy"`.
        seed: Each tensor depends on this and on its name, so namings and shards hold the same numbers.
        shards: Number of weight files; more than one come with an index.
        dtype: Of the weights, and the one that the configuration announces.
        siglip: With an encoder of SigLIP instead of CLIP: no CLS token, and images are scaled without their ratio.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}")
    directory = Path(directory)
    config = llava_config(size, dtype, siglip)
    _write_all_but_weights(directory, config, demo_tokenizer(size))
    if weights:
        _write_weights(directory, config, naming, seed, shards, getattr(torch, dtype))
    return directory


def save_llava_checkpoint(
    directory: str | os.PathLike[str],
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    naming: Naming = "vllm",
    dtype: DType = "bfloat16",
) -> Path:
    """Write a model that was trained, with its tokenizer, into `directory` and return its path."""
    directory = Path(directory)
    config = copy.deepcopy(model.config)
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    _write_all_but_weights(directory, config, tokenizer)
    state = model.state_dict()
    write_weights(
        directory,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        rename=lambda name: renamed(name, RENAMES[naming]),
        weight=lambda name, shape: state[name].detach().cpu().contiguous(),
        shards=1,
        dtype=getattr(torch, dtype),
    )
    return directory


def _write_all_but_weights(directory: Path, config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=config.image_token_index + 1).save_pretrained(
        directory
    )
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    has_cls = isinstance(config.vision_config, CLIPVisionConfig)
    image_processor = (
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        if has_cls
        else SiglipImageProcessor(size=square)
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_cls),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    image_processor.save_pretrained(
        directory
    )  # transformers 5 puts it into processor_config.json; released ones have both


def llava_config(size: Size, dtype: DType = "float32", siglip: bool = False) -> LlavaConfig:
    """The configuration of LLaVA-1.5 in a size, with the token ids of `demo_tokenizer`."""
    encoder: dict[str, Any] = dict(image_size=336, patch_size=14, **VISION[size])
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=SiglipVisionConfig(vision_use_head=False, **encoder) if siglip else CLIPVisionConfig(**encoder),
        text_config=LlamaConfig(
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=IMAGE_TOKEN_ID[size] + 1,
            **TEXT[size],
        ),
        image_token_index=IMAGE_TOKEN_ID[size],
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if siglip else "default",
        dtype=dtype,
    )


def trained_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE with `TRAINED_TOKENS` tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_TOKENS,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words.sentences(), trainer)
    return tokenizer


def demo_tokenizer(size: Size = "tiny") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives the round trip, common words are one token each."""
    tokenizer = trained_tokenizer([UNK, BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    tokenizer.add_tokens([f"<unused_{index}>" for index in range(TRAINED_TOKENS, IMAGE_TOKEN_ID[size])])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True), AddedToken(PAD_TOKEN, special=True)])
    return llava_tokenizer(tokenizer)


def llava_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that has the special tokens of LLaVA, as transformers and vLLM take it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


TRAINED = Path(__file__).parent / "model"
"""The model that comes with the package: of LLaVA's architecture, trained on scenes by `python -m training`."""


def embedded_checkpoint(family: str = DEFAULT) -> Path:
    """What is served and shown where no model is named: `TRAINED`, or of other families a random `tiny_checkpoint`."""
    return TRAINED if family == DEFAULT else tiny_checkpoint(family)


def tiny_checkpoint(family: str = DEFAULT) -> Path:
    """The tiny random checkpoint of one of `FAMILIES`, built on first use and kept in the user's cache directory.

    The directory's name holds a digest of what it is built from, so a new version builds anew. Several processes may
    call this at once: each builds in a directory of its own, and the first to finish gives it its name.
    """
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    write = pkgutil.resolve_name(FAMILIES[family])
    for source in sorted({__file__, words.__file__, weight_files.__file__, inspect.getfile(write)}):
        digest.update(Path(source).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-vtprune"
    target = cache / f"{family}-tiny-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
        try:
            building.chmod(0o755)
            write(building)
            building.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _write_weights(
    directory: Path, config: LlavaConfig, naming: Naming, seed: int, shards: int, dtype: torch.dtype
) -> None:
    write_weights(
        directory,
        _shapes(config),
        rename=lambda name: renamed(name, RENAMES[naming]),
        weight=lambda name, shape: random_weight(name, shape, seed),
        shards=shards,
        dtype=dtype,
    )


def _shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Weights under which patches look different and the next token depends on all of them."""
    values = noise(name, shape, seed)
    if "norm" in name or "layrnorm" in name:
        return values.mul_(0.1).add_(1.0 if name.endswith(".weight") else 0.0)
    if name.endswith(".bias"):
        return values.mul_(0.1)
    if any(part in name for part in ("embed_tokens", "class_embedding", "cls_token", "image_newline")):
        return values
    if "position_embedding" in name:
        return values.mul_(0.03)
    if "patch_embedding" in name:
        values -= values.mean(dim=(2, 3), keepdim=True).mul_(0.7)  # look for texture more than for brightness
    gain = 2.0 if any(part in name for part in ("patch_embedding", "q_proj", "k_proj", "lm_head")) else 1.0
    return values.mul_(gain / math.sqrt(math.prod(shape[1:])))
