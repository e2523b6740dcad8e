"""``GET /v1/pruning``: what the ``pruning`` field may contain on this server."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

import torch
import vllm
from pydantic import BaseModel, Field

import vllm_vtprune
from vllm_vtprune.plugin.encoder_client import EncoderClient
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.gpu import encoder_labels
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.selectors import method as selectors
from vllm_vtprune.selectors.method import COSTS, Cost
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_server.policies import Policies


class Method(BaseModel):
    """A value of ``pruning.method``."""

    name: str
    idea: str = Field(description="What the method keeps.")
    paper: str
    available: bool = Field(description="Whether this model provides what the method needs.")
    needs: list[str] = Field(description="Required inputs.")
    uses: list[str] = Field(description="Optional inputs.")
    parameters: list[str] = Field(description="Policy fields that the method reads, besides method and budget.")
    merges: bool = Field(description="Whether dropped tokens are merged into kept ones.")
    own_count: bool = Field(description='Whether {"budget": {"type": "method"}} is accepted.')
    cost: Cost = Field(description="How the time to select grows. " + "; ".join(f"{c}: {w}" for c, w in COSTS.items()))


class VisionEncoder(BaseModel):
    """The vision encoder."""

    weights: Literal["checkpoint", "dummy"]
    device: str
    shared: bool = Field(
        description="Whether one encoder process per device serves all API processes; else each has its own encoder."
    )
    dtype: str
    parameters: int | None = Field(description="Number of weights; null until the encoder is loaded.")


class Versions(BaseModel):
    """Versions of the server's software."""

    vllm_vtprune: str
    vllm: str
    torch: str
    transformers: str


class PruningInformation(BaseModel):
    """What the ``pruning`` field of a request may contain."""

    object: Literal["pruning"] = "pruning"
    models: list[str] = Field(description="Names under which the model is served.")
    default: dict[str, Any] = Field(description="Policy of requests that set none.")
    default_preset: str | None = Field(description="Preset of the default; null if the default is not a preset.")
    presets: dict[str, dict[str, Any]] = Field(description="Policy of each preset.")
    detail: dict[str, dict[str, Any]] | None = Field(
        description="Policy of each detail of an image; null if the server does not follow detail (--pruning-detail)."
    )
    aliases: dict[str, str] = Field(description="Preset of each model alias NAME@PRESET.")
    methods: list[Method]
    family: str | None = Field(description="Model family; null if the model is served unpruned.")
    untuned: bool = Field(description="Whether the defaults were tuned on other models only.")
    placement: Literal["auto", "api", "engine"] | None = Field(
        description="Where tokens are selected (--pruning-placement); null if the model is served unpruned."
    )
    vision_encoder: VisionEncoder | None = Field(
        description="null if there is none beside the engine's: the model is served unpruned, or placement is engine."
    )
    text_pipeline: str = Field(description="Pipeline that finds the nouns of a question.")
    versions: Versions


def pruning_information(
    policies: Policies,
    processor: PruningProcessor | None,
    *,
    models: list[str],
    aliases: dict[str, str],
) -> PruningInformation:
    """The answer of ``GET /v1/pruning``.

    Args:
        policies: presets and default.
        processor: the model's processor; None if the model cannot be pruned.
        models: names under which the model is served.
        aliases: model alias -> preset.
    """
    family = None if processor is None else processor.family
    choice = None if processor is None else processor.engine_placement.choice
    return PruningInformation(
        models=models,
        default=policies.default.dump(),
        default_preset=policies.default_preset,
        presets={name: policy.dump() for name, policy in policies.available.items()},
        detail=None
        if policies.detail is None
        else {name: policies.parse(value).dump() for name, value in policies.detail.items()},
        aliases=aliases,
        family=None if family is None else family.name,
        untuned=family is not None and not family.tuned,
        methods=[_method(name, method, family) for name, method in METHODS.items()],
        placement=choice,
        vision_encoder=None if processor is None or choice == "engine" else _vision_encoder(processor),
        text_pipeline=text_pipeline_name(),
        versions=Versions(
            vllm_vtprune=vllm_vtprune.__version__,
            vllm=vllm.__version__,
            torch=torch.__version__,
            transformers=version("transformers"),
        ),
    )


def _vision_encoder(processor: PruningProcessor) -> VisionEncoder:
    weights, device, dtype = encoder_labels(processor.model_config, processor.engine)
    encoder = processor.runtime.encoder
    return VisionEncoder(
        weights=weights,
        device=device,
        shared=isinstance(encoder, EncoderClient),
        dtype=dtype,
        parameters=encoder.num_parameters,
    )


def _method(name: str, method: type[selectors.Method], family: Family | None) -> Method:
    return Method(
        name=name,
        idea=method.idea,
        paper=method.paper,
        available=family is not None and family.supports(method),
        needs=sorted(method.needs),
        uses=sorted(method.uses),
        parameters=sorted(method.parameters()),
        merges=method.merges,
        own_count=method.own_count,
        cost=method.cost,
    )
