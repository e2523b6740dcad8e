"""The demo model, the codebook of patch codes, and a forward pass for many questions about one picture.

The architecture is LLaVA's, with transformers' own modules: CLIP with a CLS token at 336 pixels and 7 layers, the last
unused (`vision_feature_layer` -2, as in LLaVA-1.5), the two-layer projector, a LLaMA. 8.7 million parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from training.tokenizer import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, VOCABULARY
from vllm_vtprune_evaluation.scenes import FIELDS, code_size
from vllm_vtprune_evaluation.scenes.labels import POSITION_SIZE

GRID = 24
WIDTH = 256  # of the language model


LAYERS = 6  # of the language model


def model_config(layers: int = LAYERS) -> LlavaConfig:
    """`layers`: layers of the language model, at least three; tests use fewer than `LAYERS`."""
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            image_size=336,
            patch_size=14,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=7,
            num_attention_heads=3,
            projection_dim=192,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
    )


class Codebook(nn.Module):
    """Patch codes to vectors of the language model's width, and back. Fixed, with orthonormal rows."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.randn(WIDTH, code_size(), generator=torch.Generator().manual_seed(0))
        self.rows = nn.Buffer(torch.linalg.qr(noise)[0].T.contiguous())

    def forward(self, codes: Tensor) -> Tensor:
        """(..., code_size()) -> (..., WIDTH)"""
        return codes @ self.rows

    def read(self, vectors: Tensor) -> Tensor:
        """(..., WIDTH) -> (..., code_size())"""
        return vectors @ self.rows.T


def code_columns() -> dict[str, int]:
    """The column of each value's code, by `field=value`."""
    names = [f"{field}={value}" for field, values in FIELDS.items() for value in values if value != "none"]
    return {name: column for column, name in enumerate(names)}


def new_model(seed: int, tokenizer: object, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """Random weights, except that words for what a patch shows, or where it is, start as its code.

    A projector trained on captions ends up near the embeddings of the words that describe a patch; here it starts
    there. That shortens training, and makes visual tokens comparable with words, as some methods need.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(model_config(layers)).float()
    for name, weight in model.named_parameters():
        if "position_embedding" in name:
            weight.data[1:] = plane_waves(weight.shape[1])
        elif weight.ndim > 1:
            fan_in = math.prod(weight.shape[1:])
            nn.init.normal_(weight, std=1 / 16 if "embed_tokens" in name else 0.5 / math.sqrt(fan_in))
        if any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2")) and name.endswith(".weight"):
            weight.data /= math.sqrt(2 * 6)
    rows = Codebook().rows
    down, right = (rows[code_size() - size] for size in (POSITION_SIZE, POSITION_SIZE // 2))
    starts = {" top": -down, " bottom": down, " left": -right, " right": right}
    for value, column in code_columns().items():
        field, word = value.split("=")
        if field in ("colour", "shape", "character"):
            starts |= dict.fromkeys((f" {word}", word) if field != "character" else (word,), rows[column])
    for text, vector in starts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        if len(ids) == 1:
            model.get_input_embeddings().weight.data[ids[0]] = vector
            model.lm_head.weight.data[ids[0]] = vector
    return model


def plane_waves(width: int) -> Tensor:
    """(GRID * GRID, width): sines and cosines of rows and of columns, the initial position embeddings."""
    waves = 2 * math.pi / GRID * torch.arange(GRID)[:, None] * torch.logspace(-2, math.log2(GRID / 2), width // 4, 2)
    along = torch.cat([waves.sin(), waves.cos()], dim=1)  # (GRID, width / 2)
    return 0.3 * torch.cat([along.repeat_interleave(GRID, 0), along.repeat(GRID, 1)], dim=1)


@dataclass(frozen=True)
class Packed:
    """The questions and answers that follow each of B pictures: (B, T), padded on the right."""

    ids: Tensor
    pairs: Tensor  # index of the question that a token belongs to; -1 for padding
    places: Tensor  # index of a token in its question and answer
    wanted: Tensor  # whether the next token belongs to the answer, or ends it
    targets: Tensor  # (number wanted,): those next tokens

    def to(self, device: torch.device) -> Packed:
        """A copy on another device."""
        return Packed(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Looks:
    """L attention targets for heads of layer `LOOKING`: the visual tokens that a question asks about.

    Without supervision, a model of this size takes very long to learn this. All are (L,), except `targets` (L, N). In a
    row that holds a 1, attention may be on any token with a 1; other rows are shares of the head's attention, the rest
    of which belongs on the prefix.
    """

    rows: Tensor  # index in the batch
    tokens: Tensor  # index in the text
    heads: Tensor
    targets: Tensor
    weights: Tensor  # in the loss

    def to(self, device: torch.device) -> Looks:
        """A copy on another device."""
        return Looks(*(getattr(self, field.name).to(device) for field in fields(self)))


LOOKING = -3  # the supervised layer: earlier ones combine the words for a thing, later ones use what it attended to


def patch_states(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """(B, 3, 336, 336) -> states of CLS and the patches after the vision encoder (B, 577, 192)."""
    clip = model.model.vision_tower
    hidden = clip.pre_layrnorm(clip.embeddings(pixels))
    for layer in clip.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def encode(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, 336, 336) -> visual tokens (B, 576, WIDTH) and the state of CLS (B, 192)."""
    states = patch_states(model, pixels)
    return model.model.multi_modal_projector(states[:, 1:]), states[:, 0]


def answer_logits(
    model: LlavaForConditionalGeneration,
    prefix: Tensor,
    visual: Tensor,
    visual_positions: Tensor,
    text: Packed,
    looks: Looks | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Logits for many questions and answers about each picture, each as if asked alone.

    Args:
        model: the demo model.
        prefix: (p,) ids of the tokens before the picture.
        visual: (B, N, WIDTH) visual tokens.
        visual_positions: (B, N), not necessarily whole numbers; texts continue from the last one.
        text: the questions and answers after the picture.
        looks: attention targets.

    Returns:
        Logits (number of wanted tokens, vocabulary), and the attention losses (L,) in nats, if there are targets.
    """
    llama = model.model.language_model
    batch = len(text.ids)
    before = prefix.shape[0]
    shared = before + visual.shape[1]
    heads = llama.config.num_attention_heads

    positions = torch.cat(
        [
            torch.arange(before, device=prefix.device).expand(batch, before),
            visual_positions,
            visual_positions[:, -1:] + 1 + text.places,
        ],
        dim=1,
    )
    angles = positions[..., None] * llama.rotary_emb.inv_freq.float()  # (B, T, head / 2)
    cos, sin = (f(angles).repeat(1, 1, 2)[:, None] for f in (torch.cos, torch.sin))

    same = text.pairs[:, :, None] == text.pairs[:, None, :]
    mask = functional.pad(same & torch.ones_like(same).tril(), (shared, 0), value=True)[:, None]

    look_losses = None
    hidden = torch.cat([llama.embed_tokens(prefix).expand(batch, before, -1), visual, llama.embed_tokens(text.ids)], 1)
    for index, layer in enumerate(llama.layers):
        last = index == len(llama.layers) - 1  # after which the picture's states are not read
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = query * cos + _rotated(query) * sin, key * cos + _rotated(key) * sin
        if looks is not None and layer is llama.layers[LOOKING]:
            look_losses = _look_losses(looks, query[:, :, shared:], key, mask[:, 0], before)
        mixed = functional.scaled_dot_product_attention(query[:, :, shared:], key, value, attn_mask=mask)
        if last:
            hidden = hidden[:, shared:]
        else:
            seen = functional.scaled_dot_product_attention(
                query[:, :, :shared], key[:, :, :shared], value[:, :, :shared], is_causal=True
            )
            mixed = torch.cat([seen, mixed], dim=2)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(llama.norm(hidden[text.wanted])), look_losses


def _look_losses(looks: Looks, query: Tensor, key: Tensor, mask: Tensor, before: int) -> Tensor:
    """(L,), from queries (B, heads, T, h) of the texts, keys (B, heads, S, h) and the mask (B, T, S)."""
    asking = query[looks.rows, looks.heads, looks.tokens]  # (L, h)
    scores = torch.einsum("lh,lsh->ls", asking, key[looks.rows, looks.heads]).float() / math.sqrt(asking.shape[-1])
    log_share = scores.masked_fill(~mask[looks.rows, looks.tokens], -math.inf).log_softmax(-1)
    visual = log_share[:, before : before + looks.targets.shape[1]]
    any_of = torch.logsumexp(visual.masked_fill(looks.targets == 0, -math.inf), -1)
    start = torch.logsumexp(log_share[:, :before], -1)
    each_of = (looks.targets * visual).sum(-1) + (1 - looks.targets.sum(-1)) * start
    return -torch.where(looks.targets.amax(-1) == 1, any_of, each_of)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
