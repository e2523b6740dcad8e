"""LLaVA in plain transformers, layer by layer: tokens may leave between any two layers of the language model.

Each layer's own modules are called, in float32 with eager attention, so that attention maps can be read and each layer
caches the keys and values of just those tokens that entered it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, DynamicCache, LlavaForConditionalGeneration

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune_evaluation.in_llm.pruning import Entrance, Pruning, last_attention


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without the token that ends it.
        tokens: mean number of visual tokens over the layers during prefill.
    """

    text: str
    tokens: float


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question about a picture, as the language model reads it.

    Attributes:
        ids: ``(T,)``, with one placeholder for each visual token.
        embeds: ``(T, d)``.
        start: the first visual token's position.
        features: the picture's N visual tokens.
    """

    ids: Tensor
    embeds: Tensor
    start: int
    features: VisualFeatures


@dataclass(eq=False)
class Reading:
    """A model that has read a prompt, and perhaps some tokens more.

    Attributes:
        logits: ``(vocabulary,)`` for the next token.
        position: of the next token.
        cache: keys and values, of each layer those of the tokens that entered it.
        kept: for each layer the visual tokens ``(n,)`` that entered it, ascending, numbered from 0 to N - 1.
    """

    logits: Tensor
    position: int
    cache: Any
    kept: list[Tensor]

    @property
    def tokens(self) -> float:
        """Mean number of visual tokens over the layers."""
        return sum(len(kept) for kept in self.kept) / len(self.kept)


def check_kind(checkpoint: Path) -> None:
    """Look at a checkpoint's configuration, without its weights.

    Raises:
        OSError: it has none.
        ValueError: it is of another kind than LLaVA-1.5 with LLaMA as its language model.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    kinds = [getattr(part, "model_type", None) for part in (config, getattr(config, "text_config", None))]
    if kinds != ["llava", "llama"]:
        raise ValueError(f"checkpoint must be of the types llava and llama, got {kinds} from {checkpoint}")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer must be one layer, got {config.vision_feature_layer!r}")


class InLLM:
    """A LLaVA checkpoint with LLaMA as its language model.

    The features of the last picture are kept, so ask all questions about a picture one after the other.

    Args:
        checkpoint: a directory in the layout of `llava-hf/llava-1.5-7b-hf`.
        add_special_tokens: whether the tokenizer puts its special tokens (BOS) before what the chat template gives, as
            the model's processor and vLLM's `LLM.chat` do. vLLM's chat endpoint does not unless a request says so.

    Raises:
        ValueError: when the checkpoint is of another kind or does not hold every weight.
    """

    def __init__(self, checkpoint: Path, *, add_special_tokens: bool = True) -> None:
        check_kind(checkpoint)
        self.model, loading = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if any(loading.values()):
            raise ValueError(f"checkpoint must hold exactly the model's weights, got {loading} from {checkpoint}")
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.add_special_tokens = add_special_tokens
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self._llama = self.model.model.language_model
        self._last: tuple[bytes, VisualFeatures] | None = None

    def answer(
        self, picture: Image.Image, question: str, pruning: Pruning | None = None, max_tokens: int = 12
    ) -> Answer:
        """Answer greedily; without ``pruning``, with all tokens in all layers.

        Raises:
            ValueError: when ``max_tokens`` is below 1, ``question`` holds the image token, or the method cannot do what
                is asked of it with this model.
        """
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens must be an integer, 1 or more, got {max_tokens!r}")
        reading = self.prefill(self.prompt(picture, question), pruning)
        ids: list[int] = []
        while (token := int(reading.logits.argmax())) not in self.ends:
            ids.append(token)
            if len(ids) == max_tokens:
                break
            self.extend(reading, token)
        return Answer(self.processor.tokenizer.decode(ids, skip_special_tokens=True), reading.tokens)

    @torch.no_grad()
    def features(self, picture: Image.Image) -> VisualFeatures:
        """The picture's tokens before and after the projector; of the last picture they are kept."""
        picture = picture.convert("RGB")
        digest = hashlib.blake2b(f"{picture.size}".encode() + picture.tobytes()).digest()
        if self._last is None or self._last[0] != digest:
            pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            seen = self.model.get_image_features(pixel_values=pixels)
            config = self.model.config
            encoder = seen.hidden_states[config.vision_feature_layer][0]
            if config.vision_feature_select_strategy == "default":
                encoder = encoder[1:]  # without CLS
            side = config.vision_config.image_size // config.vision_config.patch_size
            embeds = seen.pooler_output[0]
            self._last = digest, VisualFeatures(encoder, embeds, (side, side) if side**2 == len(embeds) else None)
        return self._last[1]

    def token_ids(self, question: str) -> tuple[list[int], int]:
        """A picture and then the question, in the form of the checkpoint's chat template: ids, and the picture's place.

        Raises:
            ValueError: when the question holds the image token.
        """
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=self.add_special_tokens)["input_ids"]
        image = self.model.config.image_token_id
        if ids.count(image) != 1:
            raise ValueError(f"question must be a text without the image token, got {question!r}")
        return ids, ids.index(image)

    @torch.no_grad()
    def prompt(self, picture: Image.Image, question: str) -> Prompt:
        """The picture and then the question, in the form of the checkpoint's chat template.

        Raises:
            ValueError: when the question holds the image token.
        """
        features = self.features(picture)
        ids, start = self.token_ids(question)
        n = features.num_tokens
        whole = torch.tensor([*ids[:start], *[self.model.config.image_token_id] * n, *ids[start + 1 :]])
        embeds = self.model.get_input_embeddings()(whole)
        embeds[start : start + n] = features.embeds
        return Prompt(whole, embeds, start, features)

    @torch.no_grad()
    def prefill(self, prompt: Prompt, pruning: Pruning | None = None) -> Reading:
        """Read a prompt; visual tokens leave as ``pruning`` says, and those that stay keep their positions."""
        length, n, start = len(prompt.ids), prompt.features.num_tokens, prompt.start
        layers = self._llama.layers
        schedule = [n] * len(layers) if pruning is None else pruning.schedule(prompt.features, len(layers))
        hidden = prompt.embeds[None]
        rotary = self._llama.rotary_emb(hidden, position_ids=torch.arange(length)[None])
        mask = causal_mask(length)
        cache = DynamicCache(config=self._llama.config)
        left, attention, kept = torch.arange(n), None, []
        for layer, count in zip(layers, schedule, strict=True):
            if pruning is not None and count < len(left):
                entrance = Entrance(prompt.features, left, attention, layer, hidden, rotary, mask, start)
                stay = pruning.choose(entrance, count).sort().values
                after = torch.arange(start + len(left), hidden.shape[1])
                rows = torch.cat([torch.arange(start), start + stay, after])
                hidden, rotary = hidden[:, rows], (rotary[0][:, rows], rotary[1][:, rows])
                left, mask = left[stay], causal_mask(len(rows))
            hidden, weights = run_layer(layer, hidden, rotary, mask, cache)
            attention = last_attention(weights, start, len(left))
            kept.append(left)
        return Reading(self._logits(hidden), length, cache, kept)

    @torch.no_grad()
    def extend(self, reading: Reading, token: int) -> None:
        """Read one token more."""
        hidden = self.model.get_input_embeddings()(torch.tensor([[token]]))
        rotary = self._llama.rotary_emb(hidden, position_ids=torch.tensor([[reading.position]]))
        for layer in self._llama.layers:
            hidden, _ = run_layer(layer, hidden, rotary, None, reading.cache)
        reading.logits = self._logits(hidden)
        reading.position += 1

    def _logits(self, hidden: Tensor) -> Tensor:
        """``(vocabulary,)`` after the last of ``hidden (1, T, d)``."""
        logits: Tensor = self.model.lm_head(self._llama.norm(hidden[0, -1]))
        return logits


def run_layer(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor]:
    """One decoder layer on ``hidden (1, T, d)``, whose keys and values go into ``cache``.

    Returns:
        ``(1, T, d)``, and the attention ``(1, heads, T, S)``, where S counts what the layer had cached before too.
    """
    mixed, weights = layer.self_attn(
        layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask, past_key_values=cache
    )
    hidden = hidden + mixed
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights


def causal_mask(length: int) -> Tensor:
    """``(1, 1, length, length)`` to be added to attention scores: none from a token to a later one."""
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
