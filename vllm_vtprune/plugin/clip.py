"""What models with a CLIP encoder have in common: LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig

from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import unpruned


def has_tower(config: Any) -> bool:
    """Whether we have a tower for a model of these architectures, which also cover Pixtral and SigLIP encoders.

    The tower says why not; it is not asked here because engine processes build processors too.
    """
    return isinstance(config.vision_config, CLIPVisionConfig) and config.vision_feature_select_strategy == "default"


def processor_factory(pruning: type[PruningProcessor], stock: Any) -> Callable[[Any, Any], Any]:
    """The factory that vLLM is to build processors with.

    Args:
        pruning: the processor of models that can be pruned.
        stock: vLLM's own factory, for the others.
    """

    def build(info: Any, dummy_inputs: Any) -> Any:
        if has_tower(info.get_hf_config()):
            return pruning(info, dummy_inputs)
        return unpruned(stock, info, dummy_inputs)

    return build
