"""What methods read of images, while a vision model of vLLM's encodes them: in an API process, or in the engine."""

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
    """Makes features of what a vision model gives and, within `watching`, of what hooks see on its way.

    ``embeds`` are the model's output. Watched, ``encoder`` is what feeds the connector, of merged patches their mean,
    or ``embeds`` where no more is known of the family; ``cls_attention`` and ``keys`` are those of the last attention,
    the sum and the mean of merged patches; ``overview_attention`` is that of the first layer.

    Args:
        model: of vLLM's.
        family: of the model.
        config: of the model.
    """

    def __init__(self, model: nn.Module, family: Family, config: ModelConfig) -> None:
        self._width: int = config.hf_text_config.hidden_size
        self._across = family.merge(config.hf_config)
        self._patches = 1 if family.pooled else self._across**2  # of a token, in what the connector is given
        self._rows = family.rows
        self._connector = _Inputs(_submodule(model, family.connector)) if family.connector else None
        self._attention = [_Inputs(_submodule(model, path)) for path in family.attention or ()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context, features hold what hooks see."""
        hooks = [hook for hook in (self._connector, *self._attention) if hook is not None]
        for hook in hooks:
            hook.calls = []
        try:
            yield
        finally:
            for hook in hooks:
                hook.calls = None

    def features(self, embeds: Sequence[Tensor], layouts: Sequence[Layout]) -> list[VisualFeatures]:
        """Features of each image, each in memory of its own.

        Args:
            embeds: (T, d + p) the model's output for each image.
            layouts: of the images.
        """
        tokens = [layout.patches // self._across**2 for layout in layouts]
        encoder, early, attention, keys = None, None, None, None
        if self._connector is not None and self._connector.calls is not None:
            inputs = [self._rows(self._connector.module, *arguments) for arguments in self._connector.calls]
            states = torch.cat([rows.flatten(0, -2) for rows in inputs])
            encoder = torch.split(states.reshape(sum(tokens), self._patches, -1).mean(dim=1), tokens)
        if self._attention and self._attention[0].calls is not None:
            first, last = (
                [_of_cls(inputs.module, *call[:2], across=self._across) for call in inputs.calls or ()]
                for inputs in self._attention
            )
            early = torch.split(_over_ranks(torch.cat([weights for weights, _ in first])), tokens)
            attention = torch.split(_over_ranks(torch.cat([weights for weights, _ in last])), tokens)
            keys = torch.split(_over_ranks(torch.cat([rows for _, rows in last])), tokens)
        return [
            self._of_image(
                layout,
                embeds[i],
                *(None if values is None else values[i] for values in (encoder, early, attention, keys)),
            )
            for i, layout in enumerate(layouts)
        ]

    def _of_image(
        self,
        layout: Layout,
        rows: Tensor,
        encoder: Tensor | None,
        early: Tensor | None,
        attention: Tensor | None,
        keys: Tensor | None,
    ) -> VisualFeatures:
        """Those of one image, from the rows that belong to it."""

        def in_order(values: Tensor) -> Tensor:
            values = values.clone() if layout.sources is None else values[layout.sources.to(rows.device)]
            return values if layout.scaled is None else scaled(values, layout)

        newline = None
        if layout.places is not None:
            places = layout.places.to(rows.device)
            is_token = torch.zeros(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, places, True)
            newline = None if is_token.all() else rows[~is_token][0].clone()
            rows = rows[places]
        embeds = rows[:, : self._width].clone()
        tiles, overview = layout.tiles, None
        if tiles is not None:
            tiles = replace(tiles, ids=tiles.ids.to(rows.device))
            if early is not None and tiles.overview is not None:
                overview = in_order(early)[tiles.ids == tiles.overview]
        return VisualFeatures(
            encoder=embeds if encoder is None else in_order(encoder),
            embeds=embeds,
            grid=layout.grid,
            tiles=tiles,
            cls_attention=None if attention is None else in_order(attention),
            overview_attention=overview,
            keys=None if keys is None else in_order(keys),
            deepstack=rows[:, self._width :].clone() if rows.shape[1] > self._width else None,
            newline=newline,
            prompt=layout.prompt,
        )


def _over_ranks(mean_over_heads: Tensor) -> Tensor:
    """The mean over all heads, of means over those that each tensor-parallel rank has: as many each."""
    ranks = get_tensor_model_parallel_world_size()
    return mean_over_heads if ranks == 1 else tensor_model_parallel_all_reduce(mean_over_heads) / ranks


class _Inputs:
    """The arguments of each call of a module while `calls` is a list."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[Tensor, ...]] | None = None
        module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self.calls is not None:
            self.calls.append(arguments)


def scaled(values: Tensor, layout: Layout) -> Tensor:
    """(n, d) the overview and the canvas that is scaled -> (N, d) the overview and the canvas of the tokens."""
    assert layout.scaled is not None
    assert layout.tiles is not None
    overview, canvas = torch.split(values, [len(values) - prod(layout.scaled), prod(layout.scaled)])
    planes = canvas.T.reshape(1, -1, *layout.scaled)
    tokens = nn.functional.interpolate(planes, layout.tiles.canvas, mode="bilinear")[0]
    return torch.cat([overview, tokens.flatten(1).T])


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
    submodule: nn.Module = module
    return submodule


def _of_cls(attention: Any, query: Tensor, key: Tensor, *, across: int) -> tuple[Tensor, Tensor]:
    """What the CLS token attends to, without the map of all pairs, and keys; one value, or row, for each token.

    Args:
        attention: vLLM's layer.
        query, key: ``(S, 1 + n, heads * d)`` of S squares of n patches.
        across: patches of a token in either direction, in raster order of the square.

    Returns:
        ``(T,)`` in float32, the sum over a token's patches of their softmax over all 1 + n, mean over heads; and
        ``(T, d)`` the mean of its patches' keys, mean over heads.
    """
    query, key = (states.view(*states.shape[:2], -1, attention.head_size) for states in (query, key))
    scores = torch.einsum("shd,snhd->shn", query[:, 0].float(), key.float()) * attention.scale
    seen = scores.softmax(dim=-1).mean(dim=1)[:, 1:, None]
    return _blocks(seen, across).sum(dim=1)[:, 0], _blocks(key[:, 1:].mean(dim=2), across).mean(dim=1)


def _blocks(patches: Tensor, across: int) -> Tensor:
    """(S, n, d) in raster order of a square -> (S * n / across^2, across^2, d): its blocks in raster order."""
    squares, count, width = patches.shape
    blocks = isqrt(count) // across
    grid = patches.view(squares, blocks, across, blocks, across, width)
    return grid.transpose(2, 3).reshape(squares * blocks**2, across**2, width)


def batches(layouts: Sequence[Layout]) -> Iterator[range]:
    """Indices of consecutive images that together stay within `BATCH_PATCHES`, or of one that is larger alone."""
    begin, total = 0, 0
    for end, layout in enumerate(layouts):
        if end > begin and total + layout.patches > BATCH_PATCHES:
            yield range(begin, end)
            begin, total = end, 0
        total += layout.patches
    if begin < len(layouts):
        yield range(begin, len(layouts))
