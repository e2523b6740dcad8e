"""What methods read of images while a vLLM vision model encodes them, in an API process or in the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_vtprune.features import Layout, VisualFeatures
from vllm_vtprune.footprint import BATCH_PATCHES
from vllm_vtprune.plugin.family import Family


class FeatureReader:
    """Makes features of a vision model's output and, within `recording`, of what hooks record inside it.

    | feature | recorded at | merged patches |
    | --- | --- | --- |
    | ``encoder`` | connector input (``embeds`` if the family names no connector) | mean |
    | ``embeds`` | connector output, as the engine computes it | |
    | ``cls_attention`` | attention of the layer whose output is used | sum |
    | ``keys`` | keys of that layer | mean |
    | ``overview_attention`` | attention of the first layer | sum |
    """

    def __init__(self, model: nn.Module, family: Family, config: ModelConfig) -> None:
        self._width: int = config.hf_text_config.hidden_size
        self._merge = family.merge(config.hf_config)
        self._rows_per_token = 1 if family.pooled else self._merge**2  # rows of the connector input
        self._rows = family.rows
        self._connector = _RecordedCalls(_submodule(model, family.connector)) if family.connector else None
        self._attention = [_RecordedCalls(_submodule(model, path)) for path in family.attention or ()]
        self._hooks = [hook for hook in (self._connector, *self._attention) if hook is not None]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context, hooks record, and `features` uses what they recorded."""
        for hook in self._hooks:
            hook.calls = []
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.calls = None

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.handle.remove()

    def features(self, embeds: Sequence[Tensor], layouts: Sequence[Layout]) -> list[VisualFeatures]:
        """Features of each image, in memory of its own. Without records, ``encoder`` is ``embeds``.

        Args:
            embeds: (T, d + p) the model's output for each image.
            layouts: layouts of the images.
        """
        tokens = [layout.patches // self._merge**2 for layout in layouts]
        encoder, early_attention, attention, keys = None, None, None, None
        if self._connector is not None and self._connector.calls is not None:
            inputs = [self._rows(self._connector.module, *arguments) for arguments in self._connector.calls]
            states = torch.cat([each.flatten(0, -2) for each in inputs])
            count, merged = sum(tokens), self._rows_per_token
            if len(states) not in (count, count * merged):  # after a pixel shuffle, a token's rows are side by side
                raise RuntimeError(f"{len(states)} rows of the connector input do not fit {count} tokens")
            encoder = torch.split(states.reshape(count, merged, -1).mean(dim=1), tokens)
        if self._attention and self._attention[0].calls is not None:
            first, last = (
                [_cls_attention(hook.module, *call[:2], merge=self._merge) for call in hook.calls or ()]
                for hook in self._attention
            )
            early_attention = torch.split(_mean_over_ranks(torch.cat([scores for scores, _ in first])), tokens)
            attention = torch.split(_mean_over_ranks(torch.cat([scores for scores, _ in last])), tokens)
            keys = torch.split(_mean_over_ranks(torch.cat([layer_keys for _, layer_keys in last])), tokens)
        return [
            self._of_image(
                layout,
                embeds[i],
                *(None if values is None else values[i] for values in (encoder, early_attention, attention, keys)),
            )
            for i, layout in enumerate(layouts)
        ]

    def _of_image(
        self,
        layout: Layout,
        rows: Tensor,
        encoder: Tensor | None,
        early_attention: Tensor | None,
        attention: Tensor | None,
        keys: Tensor | None,
    ) -> VisualFeatures:
        """The features of one image from its rows: ``rows`` of the embeddings, the others of the connector input."""

        def in_token_order(values: Tensor) -> Tensor:
            values = values.clone() if layout.connector_rows is None else values[layout.connector_rows.to(rows.device)]
            return values if layout.connector_canvas is None else resize_canvas(values, layout)

        newline = None
        if layout.embed_rows is not None:
            token_rows = layout.embed_rows.to(rows.device)
            is_token = torch.zeros(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, token_rows, True)
            newline = None if is_token.all() else rows[~is_token][0].clone()
            rows = rows[token_rows]
        embeds = rows[:, : self._width].clone()
        tiles, overview = layout.tiles, None
        if tiles is not None:
            tiles = replace(tiles, ids=tiles.ids.to(rows.device))
            if early_attention is not None and tiles.overview is not None:
                overview = in_token_order(early_attention)[tiles.ids == tiles.overview]
        return VisualFeatures(
            encoder=embeds if encoder is None else in_token_order(encoder),
            embeds=embeds,
            grid=layout.grid,
            tiles=tiles,
            cls_attention=None if attention is None else in_token_order(attention),
            overview_attention=overview,
            keys=None if keys is None else in_token_order(keys),
            deepstack=rows[:, self._width :].clone() if rows.shape[1] > self._width else None,
            newline=newline,
            prompt=layout.prompt,
            distinct=layout.distinct,
            border_tokens=layout.border_tokens,
        )


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over tensor-parallel ranks, each of which has the mean over an equal share of the heads."""
    ranks = get_tensor_model_parallel_world_size()
    return values if ranks == 1 else tensor_model_parallel_all_reduce(values) / ranks


class _RecordedCalls:
    """Records the positional arguments of each call of a module, while `calls` is a list."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[Tensor, ...]] | None = None
        self.handle = module.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self.calls is not None:
            self.calls.append(arguments)


def resize_canvas(values: Tensor, layout: Layout) -> Tensor:
    """Resize the canvas from ``layout.connector_canvas`` to ``layout.tiles.canvas``, as the model does (bilinear).

    Args:
        values: (n, d) the overview's rows, then those of the canvas.

    Returns:
        (N, d) the overview's rows, then those of the resized canvas.
    """
    assert layout.connector_canvas is not None
    assert layout.tiles is not None
    overview, canvas = torch.split(values, [len(values) - prod(layout.connector_canvas), prod(layout.connector_canvas)])
    planes = canvas.T.reshape(1, -1, *layout.connector_canvas)
    tokens = nn.functional.interpolate(planes, layout.tiles.canvas, mode="bilinear")[0]
    return torch.cat([overview, tokens.flatten(1).T])


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
    submodule: nn.Module = module
    return submodule


def _cls_attention(attention: Any, query: Tensor, key: Tensor, *, merge: int) -> tuple[Tensor, Tensor]:
    """The CLS row of an attention layer, and the keys, per visual token.

    Args:
        attention: vLLM's attention layer.
        query, key: ``(S, 1 + n, heads * d)`` for S square tiles of n patches in raster order, CLS first.
        merge: patches per token in either direction.

    Returns:
        ``(T,)`` float32: softmax over all 1 + n, mean over heads, sum over a token's patches.
        ``(T, d)``: keys, mean over heads and over a token's patches.
    """
    query, key = (states.view(*states.shape[:2], -1, attention.head_size) for states in (query, key))
    scores = torch.einsum("shd,snhd->shn", query[:, 0].float(), key.float()) * attention.scale
    probabilities = scores.softmax(dim=-1).mean(dim=1)[:, 1:, None]
    return _blocks(probabilities, merge).sum(dim=1)[:, 0], _blocks(key[:, 1:].mean(dim=2), merge).mean(dim=1)


def _blocks(patches: Tensor, merge: int) -> Tensor:
    """(S, n, d) patches of S squares in raster order -> (S * n / merge^2, merge^2, d) blocks in raster order."""
    squares, count, width = patches.shape
    blocks = isqrt(count) // merge
    grid = patches.view(squares, blocks, merge, blocks, merge, width)
    return grid.transpose(2, 3).reshape(squares * blocks**2, merge**2, width)


def batches(layouts: Sequence[Layout]) -> Iterator[range]:
    """Split images, in order, into batches of at most `BATCH_PATCHES` patches; a larger image is its own batch."""
    begin, total = 0, 0
    for end, layout in enumerate(layouts):
        if end > begin and total + layout.patches > BATCH_PATCHES:
            yield range(begin, end)
            begin, total = end, 0
        total += layout.patches
    if begin < len(layouts):
        yield range(begin, len(layouts))
