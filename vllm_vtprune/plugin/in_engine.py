"""Selection in the engine's encoder step: images that come with a `Selection` leave it as their kept embeddings.

Each tensor-parallel rank encodes; the first one selects and tells the others. An engine that encodes an image again,
in a batch whose rounding differs, keeps the tokens that it kept before, so that blocks of its prefix cache fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_vtprune.cache import BoundedTable
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.plugin.compat.loading import token_table
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.items import KEPT_POSITIONS, KEPT_PROMPT
from vllm_vtprune.plugin.placement import watched_inputs
from vllm_vtprune.plugin.reading import FeatureReader, batches
from vllm_vtprune.plugin.selection import SELECTION, Selection, split
from vllm_vtprune.sequence import sequence

logger = init_logger("vllm.vtprune")

KEPT_BYTES = 64 * 1024**2
"""Main memory for the positions of kept tokens, by image, policy and nouns: for 128 tokens, 131,072 images."""
KEPT = "kept"
"""Attribute of an image's embeddings in vLLM's encoder cache: (k,) int64, which of its tokens they are."""


class SelectsInEngine:
    """Mixin before a stock model: selects the tokens of images that come with a `Selection`."""

    _pruning: Any
    _model_config: ModelConfig
    _selector: TokenSelector | None = None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of a batch of images or videos, in order.

        Args:
            kwargs: of the stock model and, for images to be pruned, `SELECTION`: (B, L) uint8, or B tensors (L,); where
                a producer selected, also `KEPT_POSITIONS`: (B, k) int64, or B tensors (k,).

        Returns:
            One (k, d + p) tensor for each image to be pruned; else as the stock model.
        """
        data = kwargs.pop(SELECTION, None)
        encode = super().embed_multimodal  # type: ignore[misc]
        if data is None:
            return encode(**kwargs)
        if self._selector is None:
            family = self._pruning.family_of(self._model_config.hf_config)
            self._selector = TokenSelector(self, family, self._model_config)  # type: ignore[arg-type]
        selections = [Selection.read(each) for each in data]
        kwargs.pop(KEPT_PROMPT, None)
        positions = kwargs.pop(KEPT_POSITIONS, None)
        if positions is not None:
            self._selector.follow(selections, positions)
        return self._selector.prune(encode, kwargs, selections)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load weights as the stock model does, and forget what was selected with others."""
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        return super().load_weights(weights)  # type: ignore[misc]


class TokenSelector:
    """Selects the tokens of the images that a model of the engine encodes.

    Args:
        model: vLLM's model, whose encoder is read.
        family: the model's family.
        config: vLLM's config of the model.

    Raises:
        EncoderError: an instance that only encodes, and the checkpoint holds no input embeddings.
    """

    def __init__(self, model: nn.Module, family: Family, config: ModelConfig) -> None:
        self._family = family
        self._reader = FeatureReader(model, family, config)
        self._token_rows = _token_rows(model, config)
        self._kept: BoundedTable[str, Tensor] = BoundedTable(KEPT_BYTES, lambda kept: kept.nbytes)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._reader.close()

    def follow(self, selections: Sequence[Selection], positions: Iterable[Tensor]) -> None:
        """Keep the tokens at the given positions, (k,) for each image, when it is pruned next."""
        for selection, kept in zip(selections, positions, strict=True):
            self._kept.put(selection.key, kept.to("cpu", torch.int32))

    def prune(
        self, encode: Callable[..., Any], fields: Mapping[str, Any], selections: Sequence[Selection]
    ) -> list[Tensor]:
        """Encode images, in batches that an encoder without pruning would have, and select.

        Args:
            encode: the stock model's ``embed_multimodal``.
            fields: its arguments for all images, as vLLM batches them.
            selections: one for each image.

        Returns:
            (k, d + p) for each image, with the attribute `KEPT`.
        """
        parts = list(batches([selection.layout for selection in selections]))
        pruned = []
        for part, of_part in zip(parts, split(fields, selections, parts), strict=True):
            chosen = selections[part.start : part.stop]
            watched = any(watched_inputs(selection.policy, self._family) for selection in chosen)
            with self._reader.recording() if watched else nullcontext():
                images = self._reader.features(encode(**of_part), [selection.layout for selection in chosen])
            pruned += [self._prune(*image) for image in zip(images, chosen, strict=True)]
        return pruned

    def _prune(self, features: VisualFeatures, selection: Selection) -> Tensor:
        known = self._kept.get(selection.key)
        if selection.keep >= features.num_tokens:
            known = torch.arange(features.num_tokens)
        if known is None or selection.policy.chosen.merges:
            kept, embeds = self._plan(features, selection)
            self._kept.put(selection.key, kept.to("cpu", torch.int32))
        else:
            kept = known.to(features.embeds.device, torch.long)
            embeds = features.embeds[kept]
        rows = sequence(features, PruningPlan(kept, kept, len(kept), None, embeds, {}))
        setattr(rows, KEPT, kept)
        return rows

    def _plan(self, features: VisualFeatures, selection: Selection) -> tuple[Tensor, Tensor]:
        """(k,) which tokens to keep, and (k, d) their embeddings: the same on all ranks."""
        device, group = features.embeds.device, get_tp_group()
        text = None
        if selection.noun_ids:
            text = self._token_rows(selection.noun_ids).to(features.embeds)  # on all ranks, each of which has a part
        if group.rank_in_group == 0:
            kept, embeds = self._decide(features, selection, text)
        else:
            kept = torch.empty(selection.keep, dtype=torch.long, device=device)
            embeds = features.embeds.new_empty(selection.keep, features.embeds.shape[1])
        if group.world_size > 1:
            kept = group.broadcast(kept.contiguous(), src=0)
            merges = selection.policy.chosen.merges
            embeds = group.broadcast(embeds.contiguous(), src=0) if merges else features.embeds[kept]
        return kept, embeds

    def _decide(self, features: VisualFeatures, selection: Selection, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same on the first rank. An error here would end the engine: then tokens at equal distances are kept."""
        try:
            plan = plan_tokens(features, selection.policy, text, family=self._family)
            if len(plan.kept) == selection.keep:
                return plan.kept, plan.embeds.to(features.embeds)
            problem = f"{len(plan.kept)} tokens were selected, {selection.keep} announced"
        except (ValueError, RuntimeError) as error:
            problem = str(error)
        logger.error("Image %s: tokens at equal distances are kept, as selection failed: %s", selection.key, problem)
        kept = torch.arange(selection.keep, device=features.embeds.device) * features.num_tokens // selection.keep
        return kept, features.embeds[kept]


def _token_rows(model: nn.Module, config: ModelConfig) -> Callable[[Sequence[int]], Tensor]:
    """What looks up rows of a model's input embeddings, without what adapters add to them.

    An instance that only encodes has no language model; its rows come from the checkpoint, as in an API process.
    """
    width = config.hf_text_config.hidden_size
    for module in model.modules():
        is_head = isinstance(module, ParallelLMHead)
        if isinstance(module, VocabParallelEmbedding) and not is_head and module.embedding_dim == width:
            table = module
            return lambda token_ids: table(torch.tensor(token_ids, device=table.weight.device))
    return token_table(config).rows
