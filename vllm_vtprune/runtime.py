"""One process's pruning state: the vision tower, its feature cache, and the tables of what was reported.

Everything here is independent of vLLM; the plugin drives it from the multimodal processor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256

import torch

from vllm_vtprune import envs, metrics, text
from vllm_vtprune.cache import BoundedTable, FeatureCache
from vllm_vtprune.encoder import BatchingEncoder, Encoded
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.policy import FamilyDefaults, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.towers.base import VisionTower

CACHE_DEVICE = torch.device("cpu")
"""Where features wait: the engine has the GPU's memory, and copying an image back is quick beside encoding it."""

ENCODE_BATCH = 8
"""Most images per forward of the tower: bounds its memory."""


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
        self.encoder = BatchingEncoder(
            self._encode,
            FeatureCache(int(envs.feature_cache_gb() * 1024**3)),
            to_cache=lambda features: features.to(CACHE_DEVICE),
            max_batch=ENCODE_BATCH,
            on_batch=self._count_batch,
        )
        self.api_process = ""
        """Which of several this is, as part of the hash of what it prunes. Each encodes for itself, in batches of its
        own; features differ in their last bits between batches, and so, now and then, does what is kept."""
        self.image_reports: BoundedTable[str, ImageReport] = BoundedTable(envs.report_table_size())
        """What was done to an item, by the hash under which vLLM caches it."""
        self.image_sizes: BoundedTable[str, tuple[int, int]] = BoundedTable(envs.report_table_size())
        """Height and width in pixels of images that may be scaled, by the key of their features."""
        self.request_reports: BoundedTable[str, RequestReport] = BoundedTable(envs.report_table_size())
        """Reports waiting for whoever sent the request, by request id."""
        self._asked: BoundedTable[str, bool] = BoundedTable(envs.report_table_size())
        self._load_tower = load_tower
        self._tower: VisionTower | None = None
        self._tower_lock = threading.Lock()

    @property
    def tower(self) -> VisionTower:
        """The vision tower; loads it on first use."""
        with self._tower_lock:
            if self._tower is None:
                self._tower = self._load_tower()
            return self._tower

    @property
    def tower_loaded(self) -> bool:
        """Whether the vision tower was loaded, without loading it."""
        return self._tower is not None

    def warm_up(self) -> None:
        """Load the tower and the text pipeline, and prune a blank image.

        So the first request does not wait for them, nor for what PyTorch and Triton prepare on first use.
        """
        [features] = self._encode([self.tower.blank()])
        policy = PruningPolicy.parse({"budget": {"type": "tokens", "keep": 1}}).resolve(self.family)
        self.plan(features, policy, ())
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
        hits = sum(not one.fresh for one in encoded)
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

    def plan(self, features: VisualFeatures, policy: PruningPolicy, noun_ids: Sequence[int]) -> PruningPlan:
        """Choose the tokens of one image.

        Args:
            features: what the tower computed.
            policy: a policy with the family's defaults filled in.
            noun_ids: token ids of the nouns to condition on; empty for the text-agnostic form.
        """
        tower = self.tower
        with cpu_threads(tower.device):
            text_embeds = tower.token_rows(noun_ids) if noun_ids else None
            return plan_tokens(features.to(tower.device), policy, text_embeds, family=self.family)

    def record_image(self, item_hash: str, report: ImageReport) -> None:
        """Remember what was done to an item, for the requests that will find it in vLLM's processor cache.

        Those have read the text themselves, which may be long: its nouns are not remembered.
        """
        self.image_reports.put(item_hash, replace(report, nouns=()))

    def record_request(self, report: RequestReport, request_id: str | None) -> None:
        """Count a request in the metrics and hold its report until `take_report` asks for it."""
        for image in report.images:
            metrics.VISUAL_TOKENS.labels(self.model_name, image.method).inc(image.visual_tokens)
            metrics.VISUAL_TOKENS_KEPT.labels(self.model_name, image.method).inc(image.kept_tokens)
            metrics.KEEP_RATIO.labels(self.model_name, image.method).observe(image.kept_tokens / image.visual_tokens)
            if image.bypass_reason is not None:
                metrics.BYPASS.labels(self.model_name, image.bypass_reason).inc()
        for stage, seconds in report.timings.items():
            metrics.STAGE_SECONDS.labels(self.model_name, stage).observe(seconds)
        if request_id is not None:
            self.request_reports.put(request_id, report)

    def take_report(self, request_id: str) -> RequestReport | None:
        """The report of a request that was processed in this process; each is handed out once."""
        return self.request_reports.pop(request_id)


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
