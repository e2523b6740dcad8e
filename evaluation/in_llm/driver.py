"""LLaVA in plain transformers, layer by layer, so that tokens can be dropped before any layer of the language model.

Calls each layer's modules in float32 with eager attention. This gives attention maps, and each layer caches only the
keys and values of tokens that entered it.
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
    """An answer of the model.

    Attributes:
        text: the text, without the end token.
        tokens: mean number of visual tokens over the layers during prefill.
    """

    text: str
    tokens: float


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question about a picture, as the language model reads it.

    Attributes:
        ids: ``(T,)`` token ids, with one placeholder per visual token.
        embeds: ``(T, d)`` input embeddings.
        start: index of the first visual token.
        features: the picture's N visual tokens.
    """

    ids: Tensor
    embeds: Tensor
    start: int
    features: VisualFeatures


@dataclass(eq=False)
class Reading:
    """The state of the model after a prompt and generated tokens.

    Attributes:
        logits: ``(vocabulary,)`` for the next token.
        position: position of the next token.
        cache: KV cache; each layer holds the tokens that entered it.
        kept: for each layer, ``(n,)`` ascending indices (0 to N - 1) of the visual tokens that entered it.
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
    """Check from its configuration that a checkpoint is a LLaVA-1.5 with a LLaMA.

    Raises:
        OSError: there is no configuration.
        ValueError: the model is of another kind.
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
            ValueError: when ``question`` holds the image token, or the method cannot do what is asked of it with this
                model.
        """
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
            outputs = self.model.get_image_features(pixel_values=pixels)
            config = self.model.config
            encoder = outputs.hidden_states[config.vision_feature_layer][0]
            if config.vision_feature_select_strategy == "default":
                encoder = encoder[1:]  # without CLS
            side = config.vision_config.image_size // config.vision_config.patch_size
            embeds = outputs.pooler_output[0]
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
        expanded = torch.tensor([*ids[:start], *[self.model.config.image_token_id] * n, *ids[start + 1 :]])
        embeds = self.model.get_input_embeddings()(expanded)
        embeds[start : start + n] = features.embeds
        return Prompt(expanded, embeds, start, features)

    @torch.no_grad()
    def prefill(self, prompt: Prompt, pruning: Pruning | None = None) -> Reading:
        """Prefill a prompt; ``pruning`` drops visual tokens, the others keep their positions."""
        length, n, start = len(prompt.ids), prompt.features.num_tokens, prompt.start
        layers = self._llama.layers
        schedule = [n] * len(layers) if pruning is None else pruning.schedule(prompt.features, len(layers))
        hidden = prompt.embeds[None]
        rotary = self._llama.rotary_emb(hidden, position_ids=torch.arange(length)[None])
        mask = causal_mask(length)
        cache = DynamicCache(config=self._llama.config)
        remaining, attention, kept = torch.arange(n), None, []
        for layer, count in zip(layers, schedule, strict=True):
            if pruning is not None and count < len(remaining):
                entrance = Entrance(prompt.features, remaining, attention, layer, hidden, rotary, mask, start)
                selected = pruning.choose(entrance, count).sort().values
                after = torch.arange(start + len(remaining), hidden.shape[1])
                rows = torch.cat([torch.arange(start), start + selected, after])
                hidden, rotary = hidden[:, rows], (rotary[0][:, rows], rotary[1][:, rows])
                remaining, mask = remaining[selected], causal_mask(len(rows))
            hidden, weights = run_layer(layer, hidden, rotary, mask, cache)
            attention = last_attention(weights, start, len(remaining))
            kept.append(remaining)
        return Reading(self._logits(hidden), length, cache, kept)

    @torch.no_grad()
    def extend(self, reading: Reading, token: int) -> None:
        """Process one more token."""
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
