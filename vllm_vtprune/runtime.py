"""The pruning state of one process: vision encoder, feature cache, and table of planned images.

Independent of vLLM; the plugin's multimodal processor calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256

import torch

from vllm_vtprune import envs, metrics, text
from vllm_vtprune.allotment import Energies
from vllm_vtprune.cache import BoundedTable, FeatureCache
from vllm_vtprune.encoder import BatchingEncoder, Encoded
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.policy import EnergyBudget, FamilyDefaults, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.tower import VisionTower

HOST = torch.device("cpu")
"""Device of the feature cache: the engine uses the GPU's memory, and copying back is fast compared to encoding."""

ON_DEVICE_BYTES = 256 * 1024**2
"""Most bytes of recent features that also stay on the GPU, so that planning need not copy them back."""

ENCODE_BATCH = 8
"""Most images per run of the encoder: bounds its memory."""

WARM_UP_TOKENS, WARM_UP_KEPT = 1152, 128
"""Token counts that exercise every spectrum solver and several panels of picks."""


class PruningRuntime:
    """Encodes images, plans which tokens to keep, and caches both.

    The encoder is loaded on first use, because vLLM's engine processes also build processors and must not load it.

    Args:
        load_tower: loads the vision encoder.
        family: defaults of the model family.
        model_name: label of the metrics.
    """

    def __init__(self, load_tower: Callable[[], VisionTower], family: FamilyDefaults, model_name: str) -> None:
        self.family = family
        self.model_name = model_name
        self.clients_write_prompts = False
        """Whether a server's clients write the prompts' options; then only a `PromptPruning` sets the policy."""
        self.image_sizes: BoundedTable[str, tuple[int, int]] = BoundedTable(envs.report_table_size())
        """Height and width in pixels of images of the method `resize`, by feature key."""
        self._load_tower = load_tower
        self._tower: VisionTower | None = None
        self._tower_lock = threading.Lock()
        self.generation = 0
        """Number of weight reloads; part of the hash of every pruned item."""
        self._start_empty()

    def _start_empty(self) -> None:
        self._on_device = FeatureCache(ON_DEVICE_BYTES)
        self.encoder = BatchingEncoder(
            self._encode,
            FeatureCache(int(envs.feature_cache_gb() * 1024**3)),
            to_cache=partial(_to_host, on_device=self._on_device),
            max_batch=ENCODE_BATCH,
            on_batch=self._count_batch,
        )
        self.prepared: BoundedTable[str, PreparedImage] = BoundedTable(
            int(envs.feature_cache_gb() * 1024**3), lambda image: image.nbytes
        )
        """Feature key -> preprocessed image whose tokens the engine selects, for other policies and texts."""
        self.planned: BoundedTable[str, tuple[str, ImageReport]] = BoundedTable(envs.report_table_size())
        """Hash of image, policy and text -> hash of vLLM's item, and report without nouns (which may be long)."""
        self.energies: BoundedTable[str, Energies] = BoundedTable(envs.report_table_size())
        """Feature key -> spectral energies, for budgets that are divided over the images of a request."""
        self._requested: BoundedTable[str, bool] = BoundedTable(envs.report_table_size())

    def renew(self) -> None:
        """Drop the encoder and all its results, because the engine's weights have changed.

        The encoder is reloaded on next use. Encodings in progress reach only the requests that already wait for them.
        """
        with self._tower_lock:
            self._tower = None
        self._start_empty()
        self.generation += 1
        metrics.FEATURE_CACHE_BYTES.labels(self.model_name).set(0)

    def forget_images(self) -> None:
        """Empty the caches of features and preprocessed images."""
        self.prepared.clear()
        self.encoder.cache.clear()
        self._on_device.clear()
        self.energies.clear()
        self._requested.clear()
        metrics.FEATURE_CACHE_BYTES.labels(self.model_name).set(0)

    @property
    def tower(self) -> VisionTower:
        """The vision encoder; loads it on first use."""
        with self._tower_lock:
            if self._tower is None:
                self._tower = self._load_tower()
            return self._tower

    @property
    def loaded_tower(self) -> VisionTower | None:
        """The vision encoder; None if it is not loaded."""
        return self._tower

    def warm_up(self, image: PreparedImage) -> None:
        """Load the encoder and the text pipeline; plan a blank image, then random features.

        Keeps model loading and the initialisation of PyTorch out of the first request. Random features,
        because the tokens of a blank image may be equal, and then little is computed.

        Args:
            image: a blank image.
        """
        [features] = self._encode([image])
        generator = torch.Generator().manual_seed(0)
        encoder, embeds = (
            torch.randn(WARM_UP_TOKENS, rows.shape[1], generator=generator).to(rows)
            for rows in (features.encoder, features.embeds)
        )
        budget = {"type": "energy", "min_tokens": WARM_UP_KEPT, "max_tokens": WARM_UP_KEPT}
        policy = PruningPolicy.parse({"budget": budget})
        self.plan(features, policy, ())
        self.plan(VisualFeatures(encoder, embeds), policy, ())  # the path without CLS attention
        text.extract_nouns("What is in the image?")

    def _encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        tower = self.tower
        with cpu_threads(tower.device):
            return tower.encode(images)

    def _count_batch(self, size: int) -> None:
        metrics.ENCODE_BATCH_SIZE.labels(self.model_name).observe(size)
        metrics.FEATURE_CACHE_MISSES.labels(self.model_name).inc(size)
        metrics.FEATURE_CACHE_BYTES.labels(self.model_name).set(self.encoder.cache.nbytes)

    def count_hits(self, encoded: Iterable[Encoded]) -> None:
        """Count the images that did not cause a run of the encoder."""
        hits = sum(not image.fresh for image in encoded)
        if hits:
            metrics.FEATURE_CACHE_HITS.labels(self.model_name).inc(hits)

    def is_first_request(self, key: str, policy: PruningPolicy, text: str) -> bool:
        """Whether this is the first request for an image with this policy and, if the policy uses it, this text.

        Args:
            key: feature key of the image.
            policy: the image's policy.
            text: the conditioning text.
        """
        identity = (key, policy.selection_digest(), text if policy.conditions_on_text else "")
        digest = sha256(repr(identity).encode("utf-8", "surrogatepass")).hexdigest()  # texts may be long
        if self._requested.get(digest):
            return False
        self._requested.put(digest, True)
        return True

    def plan(
        self, features: VisualFeatures, policy: PruningPolicy, noun_ids: Sequence[int], key: str | None = None
    ) -> PruningPlan:
        """Plan one image; see `plan_tokens`.

        Args:
            features: the image's N visual tokens.
            policy: a resolved policy.
            noun_ids: token ids of the nouns to condition on; empty for the text-agnostic form.
            key: feature key, to reuse features that are still on the GPU.
        """
        tower = self.tower
        on_device = None if key is None else self._on_device.get(key)
        if policy.selects and (policy.chosen.runs_on == "device" or isinstance(policy.budget, EnergyBudget)):
            features = on_device or features.to(tower.device)
        with cpu_threads(HOST):  # with a GPU, too: most methods run on the CPU
            text_embeds = tower.token_rows(noun_ids) if noun_ids else None
            return plan_tokens(features, policy, text_embeds, family=self.family)

    def measure(self, features: VisualFeatures, key: str) -> Energies:
        """Measure the spectral energies of an image and remember them.

        Args:
            features: the image's N visual tokens.
            key: feature key.
        """
        with cpu_threads(HOST):
            energies = Energies.of(self._on_device.get(key) or features)
        self.energies.put(key, energies)
        return energies

    def count_stages(self, report: RequestReport) -> None:
        """Observe the durations of a request's stages."""
        for stage, seconds in report.timings.items():
            metrics.STAGE_SECONDS.labels(self.model_name, stage).observe(seconds)


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


class cpu_threads:
    """Within this context, CPU kernels of the calling thread use `envs.tower_threads` threads.

    vLLM processes multimodal input with one thread by default, which suits image decoding but not a vision encoder. No
    effect for other devices.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = envs.tower_threads() if device.type == "cpu" else None

    def __enter__(self) -> None:
        if self._threads is not None:
            self._previous = torch.get_num_threads()
            torch.set_num_threads(self._threads)

    def __exit__(self, *exception: object) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._previous)
