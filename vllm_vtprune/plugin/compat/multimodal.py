"""vLLM's multimodal processing: processor hooks, processor cache, and error texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin.compat.names import require

PROCESSOR_HOOKS = (
    "_apply_hf_processor_main",
    "_bind_and_group_updates",
    "_get_cache_missing_processor_kwargs",
    "_get_mm_fields_config",
    "_get_mm_hashes",
    "_get_mm_prompt_updates",
    "_get_prompt_updates",
    "_merge_mm_kwargs",
)
"""Methods of vLLM's processors that `vllm_vtprune.plugin.processor` overrides or calls (vLLM 0.32.0).

An override that vLLM no longer calls would have no effect: images would pass unpruned. Remove when vLLM documents which
methods a processor may override.
"""
require(BaseMultiModalProcessor, *PROCESSOR_HOOKS)

_SYNTHETIC_UUID = re.compile(r"renderer-?\d+-mm-\d+-\w+-\d+")
_DATA_IS_MISSING = re.compile(r"Cache miss for (\w+) at index (\d+) but data is not provided")
_PLACEHOLDER_IS_MISSING = re.compile(r"prompt (?:placeholders|updates)|Failed to apply prompt replacement")


def without_synthetic_uuids(inputs: ProcessorInputs) -> ProcessorInputs:
    """The inputs without the image ids that vLLM invents to avoid hashing.

    vLLM 0.32.0 invents an id per request and item if both the processor cache and the prefix cache are off
    (renderers/base.py, ``_process_mm_uuids``). As a key of our feature cache, such an id would never hit. Remove when
    vLLM marks these ids.
    """
    if not inputs.mm_uuid_items:
        return inputs
    uuid_items = {
        modality: [None if uuid and _SYNTHETIC_UUID.fullmatch(uuid) else uuid for uuid in uuids]
        for modality, uuids in inputs.mm_uuid_items.items()
    }
    return inputs if uuid_items == inputs.mm_uuid_items else replace(inputs, mm_uuid_items=uuid_items)


def cache_in_use(inputs: ProcessorInputs) -> BaseMultiModalProcessorCache | None:
    """The processor cache that vLLM will use for a prompt; None if any of its media are embeddings.

    As in vLLM 0.32.0 (multimodal/processing/processor.py, ``_cached_apply_hf_processor``).
    """
    return None if any(items.get_passthrough_data() for items in inputs.mm_data_items.values()) else inputs.cache


def without_items(
    cache: BaseMultiModalProcessorCache, mm_hashes: Mapping[str, Sequence[str]]
) -> BaseMultiModalProcessorCache | None:
    """Evict items from a processor cache; None if the cache cannot evict them.

    In vLLM 0.32.0, items of a request may evict cached items of the same request. The request then fails on an
    assertion (multimodal/cache/lru.py), and the others count as sent. Remove when vLLM processes evicted items again.
    """
    for mm_hash in (mm_hash for hashes in mm_hashes.values() for mm_hash in hashes):
        cache.invalidate(mm_hash)
    return None if any(any(cache.is_cached(list(hashes))) for hashes in mm_hashes.values()) else cache


def missing_item(error: Exception) -> tuple[str, int] | None:
    """Modality and index of the item sent as a uuid only that no cache holds, from vLLM's error; None for others.

    vLLM 0.32.0 raises a plain ``ValueError`` (multimodal/processing/processor.py, ``_get_cache_missing_items``), as it
    does for wrong options. Remove when the error has its own type.
    """
    match = _DATA_IS_MISSING.search(str(error)) if isinstance(error, ValueError) else None
    return None if match is None else (match[1], int(match[2]))


def placeholder_is_missing(error: Exception) -> bool:
    """Whether vLLM's error says that a prompt has fewer placeholders than media.

    vLLM 0.32.0 raises ``RuntimeError`` and ``AssertionError`` (multimodal/processing/processor.py) and answers with
    status 500, even if the client had the prompt truncated. Remove when the error has its own type.
    """
    return isinstance(error, RuntimeError | AssertionError) and _PLACEHOLDER_IS_MISSING.search(str(error)) is not None
