"""Spectra of a model's visual features, from which energy thresholds are chosen. Starts no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_vtprune.budget import exact_spectrum
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plugin.inspection import features_of, pruning_processor
from vllm_vtprune.policy import FamilyDefaults
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture
from vllm_vtprune_evaluation.thresholds import Measured


@dataclass(frozen=True)
class Sample:
    """Encoded pictures.

    Attributes:
        features: features of the first picture.
        pictures: spectra of all pictures.
        family: defaults of the model's family.
    """

    features: VisualFeatures
    pictures: list[Measured]
    family: FamilyDefaults

    @property
    def mean_tokens(self) -> float:
        """Visual tokens of an unpruned picture, averaged over questions."""
        weights = [picture.weight for picture in self.pictures]
        return float(np.average([picture.tokens for picture in self.pictures], weights=weights))


def sample_pictures(model: str, pictures: Sequence[Picture], dtype: str) -> Sample:
    """Encode pictures, at least one, one by one; with the dtype "auto", in the model's own.

    Raises:
        InspectionFailed: the model cannot be loaded or pruned.
    """
    with Progress(desc="Loading the vision encoder"):
        processor = pruning_processor(model, dtype)
    first: VisualFeatures | None = None
    measured = []
    for picture in Progress(pictures, desc="encoded", unit="pictures"):
        features = features_of(processor, picture.paint())
        first = first or features
        rows = features.encoder if features.overview is None else features.encoder[features.overview]
        measured.append(Measured(exact_spectrum(rows), len(rows), features.num_tokens, len(picture.questions)))
    assert first is not None
    return Sample(first, measured, processor.family)
