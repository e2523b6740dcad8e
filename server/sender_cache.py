"""vLLM's cache of processed images, made to send again what never reached the engine.

The API process remembers which images its engine has, and sends those without their data. It notes an image when it has
processed it. Where the request is refused afterwards (too long, a wrong ``logit_bias``) or its client leaves, the
engine never gets it, and the next request that shows it fails with status 500.
"""

from __future__ import annotations

from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.multimodal.cache.base import MultiModalProcessorCacheInItem, MultiModalProcessorCacheOutItem
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache

from vllm_vtprune.plugin.compat import server as compat


class ResendingSenderCache(LruKeyReplicatedSenderCache):
    """A sender cache that knows an image only when a request with its data was sent.

    Until then everyone who shows the image processes it, and sends it, for themselves. vLLM's other caches hold the
    data where the request comes from, or where everyone reads it, and need none of this.
    """

    unsent: set[str]
    """Hashes of what was processed but not sent (yet)."""

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
            known = compat.known_images(self)
            if len(self.unsent) > 2 * len(known):
                self.unsent.intersection_update(known)
        return item, updates

    def clear_cache(self) -> None:
        super().clear_cache()
        self.unsent.clear()

    def note_sent(self, mm_hash: str) -> None:
        """Have an image known to whoever shows it from now on."""
        self.unsent.discard(mm_hash)


def resend_what_was_not_sent(engine_client: EngineClient) -> None:
    """Turn the sender cache of an engine client into one that sends again what was not sent.

    Args:
        engine_client: of this API process; left alone where its cache is another.
    """
    cache: Any = engine_client.renderer.mm_processor_cache
    if type(cache) is LruKeyReplicatedSenderCache:
        cache.__class__ = ResendingSenderCache  # in place: vLLM holds it in more than one place
        cache.unsent = set()
        compat.after_images_were_sent(engine_client, cache.note_sent)
