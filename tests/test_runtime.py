"""What moves between vision encoder and cache, and what is forgotten. The encoder pretends a device: torch's "meta"."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vllm_vtprune import local_encoder as module
from vllm_vtprune.features import Layout, PreparedImage, VisualFeatures
from vllm_vtprune.policy import LLAVA, PruningPolicy
from vllm_vtprune.runtime import PruningRuntime

DEVICE, HOST = torch.device("meta"), torch.device("cpu")
FIXED = {"type": "tokens", "keep": 1}
POLICY = PruningPolicy.parse({"method": "resprune", "budget": FIXED}).resolve(LLAVA)
Copies = list[tuple[torch.device, torch.device]]


class FakeVisionEncoder:
    device = DEVICE

    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        return [features_on(DEVICE) for _ in images]


def features_on(device: torch.device) -> VisualFeatures:
    return VisualFeatures(encoder=torch.zeros(4, 2, device=device), embeds=torch.zeros(4, 2, device=device))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """From where to where features were copied."""
    done: Copies = []

    def to(features: VisualFeatures, device: torch.device, **_: Any) -> VisualFeatures:
        done.append((features.embeds.device, device))
        return features if features.embeds.device == device else features_on(device)

    monkeypatch.setattr(VisualFeatures, "to", to)
    return done


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[VisualFeatures]:
    """The features of which plans were made."""
    seen: list[VisualFeatures] = []
    monkeypatch.setattr(module, "plan_tokens", lambda features, *_, **__: seen.append(features))
    return seen


@pytest.fixture
def runtime() -> PruningRuntime:
    return PruningRuntime(lambda: FakeVisionEncoder(), LLAVA, "runtime")  # type: ignore[return-value, arg-type]


def encode(runtime: PruningRuntime, key: str) -> VisualFeatures:
    return runtime.encoder.submit(key, PreparedImage({}, Layout(4))).result(60).features


def test_a_fresh_image_is_copied_once(runtime: PruningRuntime, copies: Copies, planned: list[VisualFeatures]) -> None:
    features = encode(runtime, "a")
    for _ in range(2):
        runtime.local.plan(features, POLICY, (), "a")
    assert copies == [(DEVICE, HOST)]
    assert features.embeds.device == HOST
    assert [image.embeds.device for image in planned] == [DEVICE, DEVICE]


def test_an_image_from_the_cache_is_copied_back(
    runtime: PruningRuntime, copies: Copies, planned: list[VisualFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ON_DEVICE_BYTES", features_on(DEVICE).nbytes)  # room for one
    runtime.renew()
    features, _ = encode(runtime, "a"), encode(runtime, "b")
    runtime.local.plan(features, POLICY, (), "a")
    assert copies == [(DEVICE, HOST), (DEVICE, HOST), (HOST, DEVICE)]
    assert [image.embeds.device for image in planned] == [DEVICE]


@pytest.mark.parametrize(("budget", "device"), [(FIXED, HOST), ({"type": "energy"}, DEVICE)])
def test_a_method_of_the_cpu_copies_nothing_back_unless_its_budget_does(
    budget: dict[str, Any], device: torch.device, runtime: PruningRuntime, copies: Copies, planned: list[VisualFeatures]
) -> None:
    policy = PruningPolicy.parse({"method": "uniform", "budget": budget}).resolve(LLAVA)
    runtime.local.plan(encode(runtime, "a"), policy, (), "a")
    assert copies == [(DEVICE, HOST)]
    assert [image.embeds.device for image in planned] == [device]


@pytest.mark.parametrize("forget", [PruningRuntime.renew, PruningRuntime.forget_images])
def test_forgetting_leaves_no_features(
    forget: Any, runtime: PruningRuntime, copies: Copies, planned: list[VisualFeatures]
) -> None:
    features = encode(runtime, "a")
    assert runtime.is_first_request("a", POLICY, "")
    forget(runtime)
    assert runtime.encoder.find("a") is None
    assert runtime.local.cache.nbytes == 0
    assert runtime.is_first_request("a", POLICY, ""), "vLLM's caches are empty too"
    runtime.local.plan(features, POLICY, (), "a")
    assert copies[-1] == (HOST, DEVICE)


def test_what_was_being_encoded_with_old_weights_reaches_no_cache(runtime: PruningRuntime, copies: Copies) -> None:
    old = runtime.encoder
    runtime.renew()
    old.submit("a", {}).result(60)
    assert runtime.encoder.find("a") is None
    assert runtime.generation == 1
