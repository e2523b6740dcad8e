"""What a GPU is asked to do, on a device that only says it is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.pretend_device import NAME, PretendDevice
from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.budget import exact_spectrum, spectrum
from vllm_vtprune.selectors import SELECTORS, pivots

TEXT = torch.randn(3, 256, generator=torch.Generator().manual_seed(9))
KINDS = ("random", "low rank", "duplicated", "anisotropic", "alike")


@pytest.fixture
def device() -> PretendDevice:
    return PretendDevice()


def tokens_of(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "low rank":
        return noise(n, d // 8) @ noise(d // 8, d)
    if kind == "duplicated":
        return noise(n // 4, d).repeat(4, 1)
    if kind == "anisotropic":
        return noise(n, d) * torch.arange(1, d + 1) ** -0.8 + noise(1, d)
    return noise(n, d) + (60 if kind == "alike" else 0) * noise(1, d)


def image(kind: str, n: int = 640, d: int = 256) -> VisualFeatures:
    generator = torch.Generator().manual_seed(1)
    attention, keys = torch.rand(n, generator=generator), torch.randn(n, 16, generator=generator)
    return VisualFeatures(
        tokens_of(kind, n, 64, seed=1), tokens_of(kind, n, d), (n // 32, 32), cls_attention=attention, keys=keys
    )


def plan(image: VisualFeatures, method: str, k: int, **fields: str) -> PruningPlan:
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "tokens", "keep": k}, **fields})
    return plan_tokens(image, policy, TEXT)


def inner(tensor: Any) -> Tensor:
    return tensor.inner  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "kind", "fields"),
    [
        *((name, "random", {}) for name in SELECTORS),
        ("resprune", "alike", {}),
        ("cdpruner", "alike", {}),
        *((name, "alike", {"features": "both"}) for name in ("resprune", "divprune")),
    ],
)
def test_every_method_keeps_what_it_keeps_on_a_cpu(
    method: str, kind: str, fields: dict[str, str], device: PretendDevice
) -> None:
    features = image(kind)
    expected = plan(features, method, 240, **fields)
    with device:
        on_device = features.to(NAME)
        few = plan(on_device, method, 24, **fields)
        waits_for_few = device.waits
        many = plan(on_device, method, 240, **fields)
    assert inner(many.order).tolist() == expected.order.tolist()
    assert inner(many.kept).tolist() == expected.kept.tolist()
    torch.testing.assert_close(inner(many.embeds), expected.embeds)
    assert few.embeds.device == many.embeds.device == on_device.embeds.device
    if SELECTORS[method].runs_on == "cpu":
        assert device.largest_float64 == 0
        assert device.waits == 2 * waits_for_few <= 16
    else:
        assert device.largest_float64 <= 640 * (320 if fields else 256), "a chunk of tokens, or a panel of picks"
        assert device.waits - waits_for_few < 240 / 3, "a few for each panel"


def test_only_what_a_method_reads_is_copied(device: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[VisualFeatures] = []
    to = VisualFeatures.to
    monkeypatch.setattr(VisualFeatures, "to", lambda self, device: moved.append(self) or to(self, device))
    features = image("random")
    with device:
        on_device = to(features, NAME)
        for method in ("scope", "divprune"):
            plan(on_device, method, 20)
    by_encoder, by_embeds = moved
    assert by_encoder.encoder is on_device.encoder
    assert by_encoder.cls_attention is on_device.cls_attention
    assert by_embeds.encoder is by_embeds.embeds is on_device.embeds
    assert by_encoder.keys is by_embeds.keys is by_embeds.cls_attention is None


def reference(tokens: Tensor, gate: Tensor, seed: int, k: int) -> list[int]:
    """The rule, on the vectors themselves: take the best, and remove its direction from all."""
    left = tokens.double().clone()
    energy = left.square().sum(dim=1)
    spanned = torch.maximum(energy * pivots.SPANNED, energy.max() * pivots.NEGLIGIBLE)
    chosen = [seed]
    while len(chosen) < k:
        direction = left[chosen[-1]] / left[chosen[-1]].norm()
        left -= torch.outer(left @ direction, direction)
        residual = left.square().sum(dim=1)
        scores = torch.where(residual > spanned, residual * gate, -1 / gate)
        scores[chosen] = -torch.inf
        if bool((residual <= spanned).all()):
            return chosen + scores.sort(descending=True, stable=True).indices[: k - len(chosen)].tolist()
        chosen.append(int(scores.argmax()))
    return chosen


@pytest.mark.parametrize("on", ["cpu", NAME])
@pytest.mark.parametrize("k", [1, 40, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_picks_are_those_of_the_rule(kind: str, k: int, on: str, device: PretendDevice) -> None:
    tokens = tokens_of(kind, 240, 160)
    energy = tokens.double().square().sum(dim=1)
    gate = torch.rand(240, generator=torch.Generator().manual_seed(2), dtype=torch.float64).clamp(min=0.1)
    with device:
        moved = (values.to(on) for values in (tokens, energy, gate))
        indices = pivots.weighted_pivots(*moved, 7, k)
        picks = (indices if on == "cpu" else inner(indices)).tolist()
    assert picks == reference(tokens, gate, 7, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "solver"), [(1060, 1030, "auto"), (300, 200, "auto"), (200, 300, "exact"), (400, 350, "rsvd")]
)
def test_ranks_are_those_of_a_cpu(n: int, d: int, kind: str, solver: Any, device: PretendDevice) -> None:
    """Nothing on the device is in float64, and the host waits for each block of a subspace at most."""
    features = tokens_of(kind, n, d)
    exact = exact_spectrum(features)
    for threshold in (0.9, 0.998):
        on_cpu = spectrum(features, threshold, solver, generator=torch.Generator().manual_seed(0))
        with device:
            moved = features.to(NAME)
            on_device = spectrum(moved, threshold, solver, generator=torch.Generator().manual_seed(0))
        rank, expected, known = (result.rank_at(threshold) for result in (on_device, exact, on_cpu))
        assert rank is not None
        assert expected is not None
        assert rank == known
        if solver != "rsvd":
            assert abs(rank - expected) <= 0.01 * expected
    assert device.largest_float64 == 0
    assert device.waits < 2 * 30


@pytest.mark.parametrize(
    ("n", "d", "k"), [(900, 128, 100), (900, 128, 450), (2100, 96, 48), (600, 300, 300), (1500, 200, 1500)]
)
def test_memory_is_what_is_said(n: int, d: int, k: int, device: PretendDevice) -> None:
    tokens = tokens_of("random", n, d)
    with device:
        moved = tokens.to(NAME)
        energy = moved.double().square().sum(dim=1)
        gate = torch.ones_like(energy)
        device.peak = 0
        pivots.weighted_pivots(moved, energy, gate, 0, k)
    bound = pivots.peak_bytes(n, d, k)
    assert 0.5 * bound < device.peak <= bound


def test_memory_of_16384_tokens() -> None:
    """Of Qwen2.5-VL-7B, however many are kept. The tokens take 0.23 GB of it, and what is left of them as much."""
    assert pivots.peak_bytes(16384, 3584, 16384) < 0.55e9
