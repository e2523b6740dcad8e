"""The pruning state of one process: vision encoder, and tables of its images.

Independent of vLLM; the plugin's multimodal processor calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from vllm_vtprune import envs, metrics, text
from vllm_vtprune.allotment import Energies
from vllm_vtprune.cache import BoundedTable
from vllm_vtprune.encoder import Encoded, ImageEncoder
from vllm_vtprune.features import PreparedImage
from vllm_vtprune.local_encoder import LazyVisionEncoder, LocalEncoder
from vllm_vtprune.policy import FamilyDefaults, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.vision_encoder import VisionEncoder


class PruningRuntime:
    """Has images encoded and planned, and remembers what was made of them.

    Args:
        load_encoder: loads the vision encoder on first use, because vLLM's engine processes also build processors and
            must not load it.
        family: defaults of the model family.
        model_name: label of the metrics.
    """

    def __init__(self, load_encoder: Callable[[], VisionEncoder], family: FamilyDefaults, model_name: str) -> None:
        self.family = family
        self.model_name = model_name
        self.encoder: ImageEncoder[Any] = LocalEncoder(LazyVisionEncoder(load_encoder), family, model_name)
        """The encoder of this process, or the client of a shared one."""
        self.clients_write_prompts = False
        """Whether a server's clients write the prompts' options; then only a `PromptPruning` sets the policy."""
        self.image_sizes: BoundedTable[str, tuple[int, int]] = BoundedTable(envs.report_table_size())
        """Height and width in pixels of images of the method `resize`, by feature key."""
        self.generation = 0
        """Number of weight reloads; part of the hash of every pruned item."""
        self._start_empty()

    def _start_empty(self) -> None:
        self.prepared: BoundedTable[str, PreparedImage] = BoundedTable(
            int(envs.feature_cache_gb() * 1024**3), lambda image: image.nbytes
        )
        """Feature key -> preprocessed image whose tokens the engine selects, for other policies and texts."""
        self.planned: BoundedTable[str, tuple[str, ImageReport]] = BoundedTable(envs.report_table_size())
        """Hash of image, policy and text -> hash of vLLM's item, and report without nouns (which may be long)."""
        self.energies: BoundedTable[str, Energies] = BoundedTable(envs.report_table_size())
        """Feature key -> spectral energies, for budgets that are divided over the images of a request."""
        self._requested: BoundedTable[str, bool] = BoundedTable(envs.report_table_size())

    @property
    def local(self) -> LocalEncoder:
        """The encoder of this process, where no shared one takes its place."""
        assert isinstance(self.encoder, LocalEncoder)
        return self.encoder

    def renew(self) -> None:
        """Drop the encoder and all its results, because the engine's weights have changed."""
        self.encoder = self.encoder.renewed()
        self._start_empty()
        self.generation += 1

    def forget_images(self) -> None:
        """Empty the caches of features and preprocessed images."""
        self.prepared.clear()
        self.encoder.forget_images()
        self.energies.clear()
        self._requested.clear()

    def warm_up(self, image: PreparedImage) -> None:
        """Load the encoder and the text pipeline; see `LocalEncoder.warm_up`."""
        self.encoder.warm_up(image)
        text.read_prompt("What is in the image?")

    def count_hits(self, encoded: Iterable[Encoded[Any]]) -> None:
        """Count the images that did not cause a run of the encoder."""
        hits = sum(not image.fresh for image in encoded)
        if hits:
            metrics.FEATURE_CACHE_HITS.labels(self.model_name).inc(hits)

    def is_first_request(self, key: str, policy: PruningPolicy, text: str) -> bool:
        """Whether this is the first request for an image with this policy and, if the policy uses it, this text.

        ``key`` is the image's feature key.
        """
        identity = (key, policy.selection_digest(), text if policy.conditions_on_text else "")
        digest = sha256(repr(identity).encode("utf-8", "surrogatepass")).hexdigest()  # texts may be long
        if self._requested.get(digest):
            return False
        self._requested.put(digest, True)
        return True

    def measure(self, encoded: Encoded[Any], key: str) -> Energies:
        """Measure the spectral energies of an encoded image, and remember them; ``key``: feature key."""
        energies = self.encoder.measure(encoded, key)
        self.energies.put(key, energies)
        return energies

    def count_stages(self, report: RequestReport) -> None:
        """Observe the durations of a request's stages."""
        for stage, seconds in report.timings.items():
            metrics.STAGE_SECONDS.labels(self.model_name, stage).observe(seconds)
