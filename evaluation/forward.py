"""Greedy decoding of a LLaMA for many questions about pictures in one batch, with the same results as one by one.

Questions about the same visual tokens follow them in one row and attend to the picture but not to each other, so the
picture is processed once for all of them. Linear layers run over all rows of a batch; attention runs row by row,
without padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions about the same visual tokens.

    Attributes:
        prefix: token ids before the picture.
        visual: ``(k, d)`` visual tokens.
        questions: token ids after the picture, at least one per question.
    """

    prefix: Sequence[int]
    visual: Tensor
    questions: Sequence[Sequence[int]]

    @property
    def shared(self) -> int:
        """Tokens that all questions read."""
        return len(self.prefix) + len(self.visual)

    @property
    def length(self) -> int:
        """Tokens of the picture and all questions."""
        return self.shared + sum(map(len, self.questions))


class _Row:
    """The decoding state of the questions about the same visual tokens.

    A row's keys and values are contiguous in the cache, from ``begin`` on: those of the prompts, then of each step.
    ``mask (pending, used)`` is added to the attention scores of the pending questions' next tokens.
    """

    def __init__(self, asked: Asked, begin: int, max_tokens: int, dtype: torch.dtype) -> None:
        self.begin, self.shared, self.used = begin, asked.shared, asked.length
        self.end = begin + asked.length + len(asked.questions) * (max_tokens - 1)
        sizes = torch.tensor([len(question) for question in asked.questions])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        same = (owner[:, None] == owner).tril()
        mask = torch.zeros(same.shape, dtype=dtype).masked_fill_(~same, -torch.inf)
        self.text_mask = pad(mask, (self.shared, 0))  # (tokens of the questions, used)
        self.last = sizes.cumsum(0) - 1  # index of each question's last token among the questions' tokens
        self.mask = self.text_mask[self.last]
        self.next_position = (self.shared + sizes).tolist()
        self.pending = list(range(len(sizes)))
        self.output: list[list[int]] = [[] for _ in sizes]

    @property
    def positions(self) -> Tensor:
        """``(used,)`` positions of the prompts; each question's follow the picture's."""
        sizes = [position - self.shared for position in self.next_position]
        return torch.cat([torch.arange(self.shared), *(self.shared + torch.arange(size) for size in sizes)])

    def append(self, tokens: Sequence[int], ends: Collection[int]) -> None:
        """Append the next token of each pending question; a question with an end token is no longer pending."""
        next_tokens = list(zip(self.pending, tokens, strict=True))
        unfinished = [index for index, (_, token) in enumerate(next_tokens) if token not in ends]
        self.pending = [next_tokens[index][0] for index in unfinished]
        for index in unfinished:
            question, token = next_tokens[index]
            self.output[question].append(token)
        self.mask = self.mask[unfinished]

    def extend(self) -> tuple[Tensor, list[int]]:
        """Cache slots and positions for the last token of each pending question."""
        count = len(self.pending)
        slots = torch.arange(count) + self.begin + self.used
        positions = [self.next_position[question] + len(self.output[question]) - 1 for question in self.pending]
        mask = torch.full((count, count), -torch.inf, dtype=self.mask.dtype).fill_diagonal_(0)
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.used += count
        return slots, positions


class _Cache:
    """Keys and values of one layer: ``(slots, heads, d_head)`` each."""

    def __init__(self, slots: int, key: Tensor) -> None:
        self.keys = key.new_empty(slots, *key.shape[1:])
        self.values = torch.empty_like(self.keys)

    def put(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        self.keys[slots], self.values[slots] = key, value

    def attend(self, query: Tensor, begin: int, end: int, mask: Tensor | None) -> Tensor:
        """Attention ``(n, heads, d_head)`` of ``query (n, heads, d_head)`` to the slots; without ``mask``, causal."""
        key, value = self.keys[begin:end], self.values[begin:end]
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        mixed = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        return mixed[0].transpose(0, 1)


@torch.inference_mode()
def answer_greedily(
    model: Any, asked: Sequence[Asked], ends: Collection[int], max_tokens: int
) -> list[list[list[int]]]:
    """Token ids of the answer to every question, without the end token.

    Args:
        model: a `LlavaForConditionalGeneration` with a LLaMA, on a CPU.
        asked: the rows of the batch, at least one.
        ends: end tokens.
        max_tokens: most tokens of an answer, at least 1.
    """
    llama = model.model.language_model
    rows: list[_Row] = []
    for item in asked:
        rows.append(_Row(item, rows[-1].end if rows else 0, max_tokens, item.visual.dtype))
    hidden = torch.cat([_embedded(llama, item) for item in asked])
    slots = torch.cat([torch.arange(row.begin, row.begin + row.used) for row in rows])
    cos, sin = _rotary(llama, hidden, torch.cat([row.positions for row in rows]))
    caches: list[_Cache] = []
    *layers, deepest = llama.layers
    starts = _starts([row.used for row in rows])
    for layer in layers:
        query, key, value = _projected(layer, hidden, cos, sin)
        cache = _Cache(rows[-1].end, key)
        cache.put(slots, key, value)
        caches.append(cache)
        mixed = torch.empty_like(query)
        for row, start in zip(rows, starts, strict=True):
            middle, stop = start + row.shared, start + row.used
            begin, end = row.begin, row.begin + row.used
            mixed[start:middle] = cache.attend(query[start:middle], begin, begin + row.shared, None)
            mixed[middle:stop] = cache.attend(query[middle:stop], begin, end, row.text_mask)
        hidden = _mixed_in(layer, hidden, mixed)

    # the last layer needs only keys, values, and the last token of each question
    last = torch.cat([start + row.shared + row.last for row, start in zip(rows, starts, strict=True)])
    query, key, value = _projected(deepest, hidden, cos, sin, last)
    caches.append(_Cache(rows[-1].end, key))
    caches[-1].put(slots, key, value)
    hidden = _mixed_in(deepest, hidden[last], _attended(rows, caches[-1], query))
    while True:
        tokens = model.lm_head(llama.norm(hidden)).argmax(dim=-1).tolist()
        for row, start in zip(rows, _starts([len(row.pending) for row in rows]), strict=True):
            row.append(tokens[start : start + len(row.pending)], ends)
        max_tokens -= 1
        pending = [row for row in rows if row.pending]
        if not pending or max_tokens == 0:
            return [row.output for row in rows]
        last_tokens = [row.output[question][-1] for row in pending for question in row.pending]
        hidden = llama.embed_tokens(torch.tensor(last_tokens))
        extended = [row.extend() for row in pending]
        slots = torch.cat([row_slots for row_slots, _ in extended])
        positions = [position for _, row_positions in extended for position in row_positions]
        cos, sin = _rotary(llama, hidden, torch.tensor(positions))
        for layer, cache in zip(llama.layers, caches, strict=True):
            query, key, value = _projected(layer, hidden, cos, sin)
            cache.put(slots, key, value)
            hidden = _mixed_in(layer, hidden, _attended(pending, cache, query))


def _embedded(llama: Any, asked: Asked) -> Tensor:
    """(length, d) input embeddings of a row."""
    text = [token for question in asked.questions for token in question]
    embedded = llama.embed_tokens(torch.tensor([*asked.prefix, *text]))
    before = len(asked.prefix)
    return torch.cat([embedded[:before], asked.visual, embedded[before:]])


def _rotary(llama: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 1, d_head) each."""
    cos, sin = llama.rotary_emb(hidden, position_ids=positions[None])
    return cos[0, :, None], sin[0, :, None]


def _projected(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, query_index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (only of the tokens in ``query_index``, if set), keys and values, (T, heads, d_head) each."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (-1, attention.head_dim)
    key = _rotated(attention.k_proj(normed).unflatten(-1, heads), cos, sin)
    value = attention.v_proj(normed).unflatten(-1, heads)
    if query_index is not None:
        normed, cos, sin = normed[query_index], cos[query_index], sin[query_index]
    return _rotated(attention.q_proj(normed).unflatten(-1, heads), cos, sin), key, value


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _attended(rows: Sequence[_Row], cache: _Cache, query: Tensor) -> Tensor:
    """Attention of each row's pending questions; ``query`` holds one token per question."""
    counts = [len(row.pending) for row in rows]
    return torch.cat(
        [
            cache.attend(row_query, row.begin, row.begin + row.used, row.mask)
            for row, row_query in zip(rows, torch.split(query, counts), strict=True)
        ]
    )


def _mixed_in(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    """(T, d) output of a layer, from its input and attention."""
    hidden = hidden + layer.self_attn.o_proj(mixed.flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _starts(sizes: Sequence[int]) -> list[int]:
    """Start of each of several consecutive parts."""
    return [sum(sizes[:index]) for index in range(len(sizes))]
