"""Make vLLM's sender cache resend images that never reached the engine.

The API process sends an image's data once and later only its hash. vLLM marks an image as sent when it is processed. If
its request is then rejected (too long, an invalid ``logit_bias``) or cancelled, the engine never gets the data, and the
next request with the image fails with status 500.
"""

from __future__ import annotations

from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.multimodal.cache.base import MultiModalProcessorCacheInItem, MultiModalProcessorCacheOutItem
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache

from vllm_vtprune.plugin.compat import server as compat


class ResendingSenderCache(LruKeyReplicatedSenderCache):
    """A sender cache that treats an image as cached only after a request with its data was sent.

    Until then, every request processes and sends the image itself. vLLM's other caches keep the data in the API process
    or in shared memory and are not affected.
    """

    unsent: set[str]
    """Hashes of images that were processed but not yet sent."""

    def is_cached_item(self, mm_hash: str) -> bool:
        return mm_hash not in self.unsent and super().is_cached_item(mm_hash)

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        if mm_item is not None and mm_hash in self.unsent:
            self.invalidate(mm_hash)
        item, updates = super().get_and_update_item(mm_item, mm_hash)
        if item is not None:
            self.unsent.add(mm_hash)
            cached = compat.known_images(self)
            if len(self.unsent) > 2 * len(cached):
                self.unsent.intersection_update(cached)
        return item, updates

    def clear_cache(self) -> None:
        super().clear_cache()
        self.unsent.clear()

    def mark_sent(self, mm_hash: str) -> None:
        """Treat an image as cached from now on."""
        self.unsent.discard(mm_hash)


def resend_unsent_images(engine_client: EngineClient) -> None:
    """Convert an engine client's sender cache into a `ResendingSenderCache`; other caches are left unchanged."""
    cache: Any = engine_client.renderer.mm_processor_cache
    if type(cache) is LruKeyReplicatedSenderCache:
        cache.__class__ = ResendingSenderCache  # in place, because vLLM holds several references
        cache.unsent = set()
        compat.after_images_were_sent(engine_client, cache.mark_sent)
