"""One process's pruning state: the vision tower, its feature cache, and the table of what was planned.

Everything here is independent of vLLM; the plugin drives it from the multimodal processor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256

import torch

from vllm_vtprune import envs, metrics, text
from vllm_vtprune.cache import BoundedTable, FeatureCache
from vllm_vtprune.encoder import BatchingEncoder, Encoded
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.policy import EnergyBudget, FamilyDefaults, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.tower import VisionTower

HOST = torch.device("cpu")
"""Where features wait: the engine has the GPU's memory, and copying an image back is quick beside encoding it."""

ON_DEVICE_BYTES = 256 * 1024**2
"""Of the features that were computed last and stay on a GPU, so that planning does not copy them back."""

ENCODE_BATCH = 8
"""Most images per forward of the tower: bounds its memory."""

WARM_UP_TOKENS, WARM_UP_KEPT = 1152, 128
"""Enough for each way in which energy is measured to be tried, and for several panels of picks."""


class PruningRuntime:
    """Encodes images, plans what to keep and remembers both.

    The tower is loaded on first use, because vLLM's engine processes build processors too and must not pay for it.

    Args:
        load_tower: loads the vision tower.
        family: defaults of the model family.
        model_name: label of the metrics.
    """

    def __init__(self, load_tower: Callable[[], VisionTower], family: FamilyDefaults, model_name: str) -> None:
        self.family = family
        self.model_name = model_name
        self.clients_write_prompts = False
        """Whether what prompts carry comes from clients of a server. Then `PromptPruning` alone says how to prune."""
        self.image_sizes: BoundedTable[str, tuple[int, int]] = BoundedTable(envs.report_table_size())
        """Height and width in pixels of images that may be scaled, by the key of their features."""
        self._load_tower = load_tower
        self._tower: VisionTower | None = None
        self._tower_lock = threading.Lock()
        self.generation = 0
        """How often the weights were renewed: part of the hash of what is made with them."""
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
        self.planned: BoundedTable[str, tuple[str, ImageReport]] = BoundedTable(envs.report_table_size())
        """By the hash of image, policy and text: the hash of the item by which vLLM knows it, and the report.

        Without nouns: who asks again has read the text, which may be long.
        """
        self._asked: BoundedTable[str, bool] = BoundedTable(envs.report_table_size())

    def renew(self) -> None:
        """Forget the tower and all that was made with it, because the engine's weights have changed.

        It is loaded when it is needed next. What is being encoded meanwhile reaches nobody who asks afterwards.
        """
        with self._tower_lock:
            self._tower = None
        self._start_empty()
        self.generation += 1
        metrics.FEATURE_CACHE_BYTES.labels(self.model_name).set(0)

    def forget_images(self) -> None:
        """Empty the feature cache."""
        self.encoder.cache.clear()
        self._on_device.clear()
        self._asked.clear()
        metrics.FEATURE_CACHE_BYTES.labels(self.model_name).set(0)

    @property
    def tower(self) -> VisionTower:
        """The vision tower; loads it on first use."""
        with self._tower_lock:
            if self._tower is None:
                self._tower = self._load_tower()
            return self._tower

    @property
    def loaded_tower(self) -> VisionTower | None:
        """The vision tower, if it was loaded."""
        return self._tower

    def warm_up(self, image: PreparedImage) -> None:
        """Load the tower and the text pipeline; prune a blank image, and noise of as many tokens as images have.

        So the first request does not wait for them, nor for what PyTorch prepares on first use: of a blank
        image the tokens may be all alike, and next to nothing is computed.

        Args:
            image: a blank one.
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
        self.plan(VisualFeatures(encoder, embeds), policy, ())  # without CLS attention: resolved otherwise
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
        """Count the images that a request did not have to encode itself."""
        hits = sum(not image.fresh for image in encoded)
        if hits:
            metrics.FEATURE_CACHE_HITS.labels(self.model_name).inc(hits)

    def first_asked(self, key: str, policy: PruningPolicy, text: str) -> bool:
        """Whether nobody has asked this before for an image under the policy and, where it looks at it, the text."""
        asked = (key, policy.selection_digest(), text if policy.conditions_on_text else "")
        question = sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()  # texts may be long
        if self._asked.get(question):
            return False
        self._asked.put(question, True)
        return True

    def plan(
        self, features: VisualFeatures, policy: PruningPolicy, noun_ids: Sequence[int], key: str | None = None
    ) -> PruningPlan:
        """Choose the tokens of one image.

        Args:
            features: what the tower computed.
            policy: a policy with the family's defaults filled in.
            noun_ids: token ids of the nouns to condition on; empty for the text-agnostic form.
            key: under which the features were encoded, to find those that are still on the tower's device.
        """
        tower = self.tower
        on_device = None if key is None else self._on_device.get(key)
        if policy.selects and (policy.chosen.runs_on == "device" or isinstance(policy.budget, EnergyBudget)):
            features = on_device or features.to(tower.device)
        with cpu_threads(HOST):  # also beside a GPU: what is small, and most methods, are computed here
            text_embeds = tower.token_rows(noun_ids) if noun_ids else None
            return plan_tokens(features, policy, text_embeds, family=self.family)

    def count_stages(self, report: RequestReport) -> None:
        """Count the time that the stages of a request took."""
        for stage, seconds in report.timings.items():
            metrics.STAGE_SECONDS.labels(self.model_name, stage).observe(seconds)


def _to_host(key: str, features: VisualFeatures, *, on_device: FeatureCache) -> VisualFeatures:
    """A copy for the cache; features on a GPU are held there too, while ``on_device`` has room."""
    device = features.embeds.device
    if device == HOST:
        return features
    copied = features.to(HOST, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    on_device.put(key, features)
    return copied


class cpu_threads:
    """Within this context, CPU kernels of the calling thread use every core that this process may run on.

    vLLM processes multimodal input with one thread by default, which is right for image decoding and wrong for a
    vision encoder. No effect for other devices.
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
