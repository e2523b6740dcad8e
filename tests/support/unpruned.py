"""Any vision-language model in plain transformers, which answers as if only some tokens of each image had been there.

The model reads the whole prompt with its answer: it encodes the images, puts their tokens in their places and works out
positions by itself. A hook before its language model takes out the tokens that are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

Change: TypeAlias = Callable[[Mapping[str, Any]], dict[str, Any] | None]
"""What becomes of what a language model is given, by name; None: it stays."""


TYPES = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
"""By model, what has transformers read images in both directions. vLLM's CPU build reads them causally."""


class Reading(NamedTuple):
    """What a language model read and said.

    Attributes:
        prompt_ids: of L tokens.
        logprobs: (T, vocabulary)
        embeds: (L + T - 1, d) what it read of the prompt and of all tokens of the answer but the last.
    """

    prompt_ids: list[int]
    logprobs: Tensor
    embeds: Tensor


class UnprunedReference:
    """A checkpoint in float32 with eager attention, of which every weight is used.

    The tokens of an image are content, in the order in which the language model reads them, or structure: newlines
    (LLaVA-NeXT, LLaVA-OneVision) and break tokens (Mistral 3) at the ends of rows. Newlines stay. A break stays where a
    token of its row does; after the last row of which a token stays stands what ends an image.

    Where positions have one dimension, those left are numbered from 0 without gaps. Where they have three (M-RoPE),
    each token has the position that it has unpruned, and the answer goes on from there too.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.model, loading = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), f"not every weight of the checkpoint was used: {loading}"
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.image_token = self.model.config.image_token_id
        self._break_token = getattr(self.processor, "image_break_token_id", -1)
        self._newline = getattr(self.model.model, "image_newline", None)

    def features(self, image: Image.Image) -> Tensor:
        """(N, d): the content of an image as the language model reads it."""
        inputs = self._alone(image)
        seen: list[Tensor] = []
        self._run(inputs, lambda keywords: seen.append(keywords["inputs_embeds"][0]))
        ids = inputs["input_ids"][0]
        return seen[0][(ids == self.image_token) & ~self._structure(ids, seen[0])]

    @torch.inference_mode()
    def words(self, words: Sequence[str]) -> Tensor:
        """(M, d): rows of the input table for words as they stand inside a sentence."""
        tokenizer = self.processor.tokenizer
        ids = [token for word in words for token in tokenizer.encode(f" {word}", add_special_tokens=False)]
        rows: Tensor = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        return rows

    def logprobs(
        self, prompt: str, images: Sequence[Image.Image], kept: Sequence[Tensor | None], answer: Sequence[int]
    ) -> Tensor:
        """(T, vocabulary): as of `read`."""
        return self.read(prompt, images, kept, answer).logprobs

    def read(
        self, prompt: str, images: Sequence[Image.Image], kept: Sequence[Tensor | None], answer: Sequence[int]
    ) -> Reading:
        """The prompt of which only some tokens are there, and what is said at each of the T tokens of `answer`.

        Where every token of `answer` is the likeliest of its row, `answer` is what greedy decoding gives.

        Args:
            prompt: in the form of the checkpoint's chat template, with one placeholder for each image.
            images: RGB.
            kept: for each image which of its content is there, (k,) ascending; None for all.
            answer: ids of T tokens.
        """
        inputs = self._inputs(prompt, images, answer[:-1])
        ids = inputs["input_ids"][0]
        lengths = [self._length(image) for image in images]
        left: list[Tensor] = []
        embeds: list[Tensor] = []

        def prune(keywords: Mapping[str, Any]) -> dict[str, Any]:
            left.append(self._left(ids, keywords["inputs_embeds"][0], lengths, kept))
            window = getattr(self.model.config.get_text_config(), "sliding_window", None)
            pruned = _pruned(keywords, left[0], window)
            embeds.append(pruned["inputs_embeds"][0])
            return pruned

        logits = self._run(inputs, prune)
        prompt_ids = ids[left[0]][: len(left[0]) - len(answer) + 1]
        return Reading(prompt_ids.tolist(), logits[-len(answer) :].float().log_softmax(dim=-1), embeds[0])

    def _alone(self, image: Image.Image) -> dict[str, Tensor]:
        """What the model takes of a prompt with one image."""
        prompt = self.processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        return self._inputs(prompt, [image], [])

    def _length(self, image: Image.Image) -> int:
        """How many tokens stand for an image, of content and structure."""
        ids = self._alone(image)["input_ids"]
        return int(((ids == self.image_token) | (ids == self._break_token)).sum())

    def _inputs(self, prompt: str, images: Sequence[Image.Image], answer: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes of a prompt and of an answer's first tokens."""
        kind = self.model.config.model_type
        options = {"add_special_tokens": False} if kind == "gemma4" else {}  # they are in its chat template
        inputs = dict(self.processor(text=[prompt], images=list(images) or None, return_tensors="pt", **options))
        inputs.pop(TYPES.get(kind, ""), None)
        length = inputs["input_ids"].shape[1]
        following = {"input_ids": list(answer), "attention_mask": [1] * len(answer)}
        for name, value in inputs.items():
            if value.shape == (1, length):  # types of tokens too, of which that of text is 0
                tail = torch.tensor([following.get(name, [0] * len(answer))], dtype=value.dtype)
                inputs[name] = torch.cat([value, tail], dim=1)
        return inputs

    @torch.inference_mode()
    def _run(self, inputs: Mapping[str, Tensor], change: Change) -> Tensor:
        """(L, vocabulary): logits of the model, whose language model is given what `change` makes of it."""

        def hook(_: object, arguments: tuple[()], keywords: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
            assert not arguments
            changed = change(keywords)
            return None if changed is None else (arguments, changed)

        handle = self.model.model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits[0]
        finally:
            handle.remove()
        return logits

    def _structure(self, ids: Tensor, embeds: Tensor) -> Tensor:
        """(L,): which of a sequence's tokens (L,), with what the language model reads of them (L, d), are structure."""
        structure = ids == self._break_token
        if self._newline is not None:
            structure |= (ids == self.image_token) & (embeds == self._newline).all(dim=1)
        return structure

    def _left(self, ids: Tensor, embeds: Tensor, lengths: list[int], kept: Sequence[Tensor | None]) -> Tensor:
        """(S,): the places of the tokens that are left; `lengths`: of images, content and structure."""
        structure = self._structure(ids, embeds)
        of_images = (structure | (ids == self.image_token)).nonzero()[:, 0]
        left = torch.ones(len(ids), dtype=torch.bool)
        for run, chosen in zip(of_images.split(lengths), kept, strict=True):
            content = run[~structure[run]]
            if chosen is not None:
                left[content] = False
                left[content[chosen]] = True
            if self._newline is not None:
                continue
            row: list[int] = []
            for place in run.tolist():
                if not structure[place]:
                    row.append(place)
                    continue
                left[place] = left[row].any()
                row = []
            if row and not left[row].any():  # the token after the image's last row takes the place of the last break
                left[run[structure[run] & left[run]][-1]] = False
        return left.nonzero()[:, 0]


class TwinReference(UnprunedReference):
    """Of a checkpoint that transformers has no classes for: the twin that it has reads what vLLM's processor gives.

    Args:
        twin: a checkpoint with the same weights and token ids.
        processor: vLLM's, which leaves images unpruned if not told otherwise.
    """

    def __init__(self, twin: Path, processor: Any) -> None:
        super().__init__(twin)
        self._of_vllm = processor

    def _alone(self, image: Image.Image) -> dict[str, Tensor]:
        return self._inputs("<image>", [image], [])

    def _inputs(self, prompt: str, images: Sequence[Image.Image], answer: Sequence[int]) -> dict[str, Tensor]:
        processed = self._of_vllm(prompt, self._of_vllm.info.parse_mm_data({"image": list(images)} if images else {}))
        ids = torch.tensor([[*processed["prompt_token_ids"], *answer]])
        squares = [item["pixel_values_flat"].data for item in processed["mm_kwargs"].get("image", [])]
        pixels = {"pixel_values": torch.cat(squares)} if squares else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def _pruned(keywords: Mapping[str, Any], left: Tensor, window: int | None) -> dict[str, Any]:
    """What a language model is given, without the tokens at other places than `left` (S,); `window` as in `_mask`."""
    pruned = dict(keywords)
    for name, value in keywords.items():
        if name in ("inputs_embeds", "visual_pos_masks", "per_layer_inputs") and value is not None:
            pruned[name] = value[:, left]
        elif name == "attention_mask":
            pruned[name] = _mask(value, left, window)
        elif name == "deepstack_visual_embeds" and value is not None:
            stays = torch.isin(keywords["visual_pos_masks"][0].nonzero()[:, 0], left)
            pruned[name] = [rows[stays] for rows in value]
        else:
            assert name == "position_ids" or not isinstance(value, Tensor), f"whether {name} has tokens is not known"
    in_order = torch.arange(len(left))[None]
    positions = keywords["position_ids"]
    if positions is None or positions.ndim == 2:
        pruned["position_ids"] = in_order
    else:  # before the three there may be those of a text, by which transformers sees where sequences are packed
        pruned["position_ids"] = torch.cat([in_order[None].expand(len(positions) - 3, -1, -1), positions[-3:, :, left]])
    return pruned


def _mask(mask: Any, left: Tensor, window: int | None) -> Any:
    """A mask (1, L), or of each kind of layer (1, 1, L, L), for the tokens that are left.

    `window`: how many tokens a layer with a sliding window reads, of those that are left.
    """
    if not isinstance(mask, Mapping):
        return mask[:, left]
    full = mask["full_attention"][..., left, :][..., left]
    place = torch.arange(len(left))
    near = place > place[:, None] - (window or len(left))
    return {"full_attention": full, "sliding_attention": full.where(near, full.min())}
