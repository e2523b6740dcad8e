"""The vision encoder of this process, with its feature cache: an `ImageEncoder`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from vllm_vtprune import envs, metrics
from vllm_vtprune.allotment import Energies
from vllm_vtprune.cache import FeatureCache
from vllm_vtprune.encoder import BatchingEncoder, Encoded, PlannedImage
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.policy import EnergyBudget, FamilyDefaults, PruningPolicy
from vllm_vtprune.sequence import sequence, sequence_length
from vllm_vtprune.vision_encoder import VisionEncoder

HOST = torch.device("cpu")
"""Device of the feature cache: the engine uses the GPU's memory, and copying back is fast compared to encoding."""

ON_DEVICE_BYTES = 256 * 1024**2
"""Most bytes of recent features that also stay on the GPU, so that planning need not copy them back."""

ENCODE_BATCH = 8
"""Most images per run of the encoder: bounds its memory."""

WARM_UP_TOKENS, WARM_UP_KEPT = 1152, 128
"""Token counts that exercise every spectrum solver and several panels of picks."""


@dataclass(eq=False)
class LazyVisionEncoder:
    """A vision encoder that is loaded on first use, because not every process that could encode does."""

    load: Callable[[], VisionEncoder]
    loaded: VisionEncoder | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> VisionEncoder:
        with self._lock:
            if self.loaded is None:
                self.loaded = self.load()
            return self.loaded

    def drop(self) -> None:
        with self._lock:
            self.loaded = None


class LocalEncoder(BatchingEncoder):
    """Encodes images in this process and plans which of their tokens to keep; see `ImageEncoder`.

    Args:
        vision_encoder: the vision encoder.
        family: defaults of the model family.
        model_name: label of the metrics.
        cache_bytes: capacity of the feature cache; None: that of `envs.feature_cache_gb`.
    """

    def __init__(
        self,
        vision_encoder: LazyVisionEncoder,
        family: FamilyDefaults,
        model_name: str,
        cache_bytes: int | None = None,
    ) -> None:
        self._lazy, self._family, self._model_name = vision_encoder, family, model_name
        self._on_device = FeatureCache(ON_DEVICE_BYTES)
        super().__init__(
            self._run,
            FeatureCache(int(envs.feature_cache_gb() * 1024**3) if cache_bytes is None else cache_bytes),
            to_cache=partial(_to_host, on_device=self._on_device),
            max_batch=ENCODE_BATCH,
            on_batch=self._count_batch,
        )

    def renewed(self) -> LocalEncoder:
        """An encoder without results, whose weights are loaded on next use.

        Encodings in progress reach only the requests that already wait for them.
        """
        self._lazy.drop()
        self._count_bytes(0)
        return LocalEncoder(self._lazy, self._family, self._model_name, self.cache.capacity)

    def forget_images(self) -> None:
        self.cache.clear()
        self._on_device.clear()
        self._count_bytes(0)

    @property
    def vision_encoder(self) -> VisionEncoder:
        """The vision encoder; loads it on first use."""
        return self._lazy.get()

    @property
    def num_parameters(self) -> int | None:
        vision_encoder = self._lazy.loaded
        return None if vision_encoder is None else vision_encoder.num_parameters

    def warm_up(self, image: PreparedImage) -> None:
        """Load the encoder; plan a blank image, then random features.

        Keeps model loading and the initialisation of PyTorch out of the first request. Random features,
        because the tokens of a blank image may be equal, and then little is computed.
        """
        [features] = self._run([image])
        generator = torch.Generator().manual_seed(0)
        encoder, embeds = (
            torch.randn(WARM_UP_TOKENS, rows.shape[1], generator=generator).to(rows)
            for rows in (features.encoder, features.embeds)
        )
        budget = {"type": "energy", "min_tokens": WARM_UP_KEPT, "max_tokens": WARM_UP_KEPT}
        policy = PruningPolicy.parse({"budget": budget})
        self.plan(features, policy, ())
        self.plan(VisualFeatures(encoder, embeds), policy, ())  # the path without CLS attention

    def plan(
        self, features: VisualFeatures, policy: PruningPolicy, noun_ids: Sequence[int], key: str | None = None
    ) -> PruningPlan:
        """Plan one image; arguments as of `plan_image`, with the image's N visual tokens."""
        vision_encoder = self.vision_encoder
        on_device = None if key is None else self._on_device.get(key)
        if policy.selects and (policy.chosen.runs_on == "device" or isinstance(policy.budget, EnergyBudget)):
            features = on_device or features.to(vision_encoder.device)
        with cpu_threads(HOST):  # with a GPU, too: most methods run on the CPU
            text_embeds = vision_encoder.token_rows(noun_ids) if noun_ids else None
            return plan_tokens(features, policy, text_embeds, family=self._family)

    def plan_image(
        self,
        encoded: Encoded[VisualFeatures],
        policy: PruningPolicy,
        noun_ids: Sequence[int],
        key: str | None = None,
    ) -> PlannedImage:
        return self.planned(encoded.features, self.plan(encoded.features, policy, noun_ids, key))

    def planned(self, features: VisualFeatures, plan: PruningPlan) -> PlannedImage:
        """What a request needs of a plan of these features."""
        return PlannedImage(
            plan.kept.cpu(),
            sequence(features, plan).to(HOST, self.vision_encoder.dtype),
            features.num_tokens,
            sequence_length(features),
            plan.energy,
            plan.timings,
            KeptTokens.of(features, plan.kept),
            features.grid,
            features.prompt,
            features.border_tokens,
            None if features.distinct is None else features.num_tokens - len(features.distinct),
        )

    def measure(self, encoded: Encoded[VisualFeatures], key: str) -> Energies:
        with cpu_threads(HOST):
            return Energies.of(self._on_device.get(key) or encoded.features)

    def _run(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        vision_encoder = self.vision_encoder
        with cpu_threads(vision_encoder.device):
            return vision_encoder.encode(images)

    def _count_batch(self, size: int) -> None:
        metrics.ENCODE_BATCH_SIZE.labels(self._model_name).observe(size)
        metrics.FEATURE_CACHE_MISSES.labels(self._model_name).inc(size)
        self._count_bytes(self.cache.nbytes)

    def _count_bytes(self, nbytes: int) -> None:
        metrics.FEATURE_CACHE_BYTES.labels(self._model_name).set(nbytes)


def _to_host(key: str, features: VisualFeatures, *, on_device: FeatureCache) -> VisualFeatures:
    """A copy on the CPU for the feature cache; also puts GPU features into ``on_device``."""
    device = features.embeds.device
    if device == HOST:
        return features
    copied = features.to(HOST, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    on_device.put(key, features)
    return copied


@contextmanager
def cpu_threads(device: torch.device) -> Iterator[None]:
    """Within this context, CPU kernels of the calling thread use `envs.encoder_threads` threads.

    vLLM processes multimodal input with one thread by default, which suits image decoding but not a vision encoder. No
    effect for other devices.
    """
    if device.type != "cpu":
        yield
        return
    previous = torch.get_num_threads()
    torch.set_num_threads(envs.encoder_threads())
    try:
        yield
    finally:
        torch.set_num_threads(previous)
