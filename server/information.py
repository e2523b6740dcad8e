"""``GET /v1/pruning``: what this server can do with the ``pruning`` field, for people and for clients that adapt."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

import torch
import vllm
from pydantic import BaseModel, Field

import vllm_vtprune
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.selectors import method as selectors
from vllm_vtprune.selectors.method import COSTS, Cost
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_server.policies import Policies


class Method(BaseModel):
    """A value of ``pruning.method``."""

    name: str
    idea: str = Field(description="What it keeps, in a few words.")
    paper: str
    available: bool = Field(description="Whether this model has what the method needs.")
    needs: list[str] = Field(description="Inputs without which the method cannot run.")
    uses: list[str] = Field(description="Inputs that it takes when they are there.")
    parameters: list[str] = Field(description="Fields of the policy, beside method and budget, that it reads.")
    merges: bool = Field(description="Whether kept tokens take in those that leave.")
    own_count: bool = Field(description='Whether {"budget": {"type": "method"}} is possible.')
    cost: Cost = Field(description="What its time grows with: " + "; ".join(f"{c}: {w}" for c, w in COSTS.items()))


class Tower(BaseModel):
    """The vision encoder of this API process."""

    weights: Literal["checkpoint", "dummy"]
    device: str
    dtype: str
    parameters: int | None = Field(description="null until the first request that needs the encoder has loaded it.")


class Versions(BaseModel):
    """Of the software that serves."""

    vllm_vtprune: str
    vllm: str
    torch: str
    transformers: str


class PruningInformation(BaseModel):
    """What requests to ``/v1/chat/completions`` may ask for in their ``pruning`` field."""

    object: Literal["pruning"] = "pruning"
    models: list[str] = Field(description="The names under which the model is served.")
    default: dict[str, Any] = Field(description="The policy of requests that name none.")
    default_preset: str | None = Field(description="The preset that the default is, if it is one.")
    presets: dict[str, dict[str, Any]] = Field(description="Policies by name.")
    aliases: dict[str, str] = Field(description="Model names that select a preset -> that preset.")
    methods: list[Method]
    family: str | None = Field(description="The family of models that the model belongs to; null where it is unpruned.")
    untuned: bool = Field(description="Whether the defaults were not chosen for models of this kind.")
    tower: Tower | None = Field(description="null where the model is served unpruned, whatever a request asks for.")
    text_pipeline: str = Field(description="What finds the nouns of a question.")
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
        policies: the operator's.
        processor: of the model; None where it cannot be pruned.
        models: the names under which the model is served.
        aliases: model names that select a preset, with that preset.
    """
    family = None if processor is None else processor.family
    return PruningInformation(
        models=models,
        default=policies.default.dump(),
        default_preset=policies.default_preset,
        presets={name: policy.dump() for name, policy in policies.presets.items()},
        aliases=aliases,
        family=None if family is None else family.name,
        untuned=family is not None and not family.tuned,
        methods=[_method(name, method, family) for name, method in METHODS.items()],
        tower=None if processor is None else _tower(processor),
        text_pipeline=text_pipeline_name(),
        versions=Versions(
            vllm_vtprune=vllm_vtprune.__version__,
            vllm=vllm.__version__,
            torch=torch.__version__,
            transformers=version("transformers"),
        ),
    )


def _tower(processor: PruningProcessor) -> Tower:
    weights, device, dtype = processor.encoder_facts.labels
    loaded = processor.runtime.loaded_tower
    return Tower(
        weights=weights, device=device, dtype=dtype, parameters=None if loaded is None else loaded.num_parameters
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
