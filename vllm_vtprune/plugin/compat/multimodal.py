"""vLLM's multimodal processing: the hooks of its processors, its caches, and what it says of missing media."""

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

An override of a method that vLLM does not call any more would have no effect: images would pass unpruned. Can go when
vLLM documents which methods a processor may override.
"""
require(BaseMultiModalProcessor, *PROCESSOR_HOOKS)

_SYNTHETIC_UUID = re.compile(r"renderer-?\d+-mm-\d+-\w+-\d+")
_DATA_IS_MISSING = "but data is not provided"
_LOST_PLACE = re.compile(r"prompt (?:placeholders|updates)|Failed to apply prompt replacement")


def without_synthetic_uuids(inputs: ProcessorInputs) -> ProcessorInputs:
    """The inputs, with the image ids removed that vLLM made up to avoid hashing.

    vLLM 0.32.0 invents an id per request and item when neither the processor cache nor prefix caching is on
    (renderers/base.py, ``_process_mm_uuids``). Such an id says nothing about the image; as a key of our feature cache
    it would never hit. Can go when the made-up ids are marked as such.
    """
    if not inputs.mm_uuid_items:
        return inputs
    uuid_items = {
        modality: [None if uuid and _SYNTHETIC_UUID.fullmatch(uuid) else uuid for uuid in uuids]
        for modality, uuids in inputs.mm_uuid_items.items()
    }
    return inputs if uuid_items == inputs.mm_uuid_items else replace(inputs, mm_uuid_items=uuid_items)


def cache_in_use(inputs: ProcessorInputs) -> BaseMultiModalProcessorCache | None:
    """The cache in which vLLM will look for the items of a prompt: none where any of its media come as embeddings.

    As vLLM 0.32.0 decides it (multimodal/processing/processor.py, ``_cached_apply_hf_processor``).
    """
    return None if any(items.get_passthrough_data() for items in inputs.mm_data_items.values()) else inputs.cache


def without_items(
    cache: BaseMultiModalProcessorCache, mm_hashes: Mapping[str, Sequence[str]]
) -> BaseMultiModalProcessorCache | None:
    """A processor cache that has none of some items: the same one, where it can forget them, else none.

    In vLLM 0.32.0 an item that is cached when a request begins may be driven out by others of the same request, which
    then fails on an assertion (multimodal/cache/lru.py), while the others are taken for sent. Can go when vLLM
    processes such an item again.
    """
    for mm_hash in (mm_hash for hashes in mm_hashes.values() for mm_hash in hashes):
        cache.invalidate(mm_hash)
    return None if any(any(cache.is_cached(list(hashes))) for hashes in mm_hashes.values()) else cache


def says_data_is_missing(error: Exception) -> bool:
    """Whether vLLM says that an image which comes by its uuid alone is in no cache.

    vLLM 0.32.0 says so in a ``ValueError`` alone (multimodal/processing/processor.py, ``_get_cache_missing_items``),
    as it does of wrong options, which would be blamed. Can go when the error has a type of its own.
    """
    return isinstance(error, ValueError) and _DATA_IS_MISSING in str(error)


def lost_place_of_medium(error: Exception) -> bool:
    """Whether vLLM found fewer places in a prompt than media.

    vLLM 0.32.0 raises ``RuntimeError`` and ``AssertionError`` (multimodal/processing/processor.py), which it answers
    with status 500, also where the client had the prompt truncated. Can go when the error has a type of its own.
    """
    return isinstance(error, RuntimeError | AssertionError) and _LOST_PLACE.search(str(error)) is not None
