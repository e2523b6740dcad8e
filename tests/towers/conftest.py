"""A tiny LLaVA built by transformers, and its weights on disk under each naming scheme."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

Renames = tuple[tuple[str, str], ...]


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LlavaConfig]:
    """Makes configs: 4 layers, 5 x 5 patches, d_v = 32, d = 48, 100 token ids; keywords override LlavaConfig's."""

    def make(**overrides: object) -> LlavaConfig:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=35,
                patch_size=7,
            ),
            text_config=LlamaConfig(
                hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
            ),
            image_token_index=99,
            **overrides,
        )

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[LlavaConfig], LlavaForConditionalGeneration]:
    """Makes a model with weights large enough that attention is far from uniform and norms are not the identity."""

    def make(config: LlavaConfig) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
        return model

    return make


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """Writes a model as one safetensors file: `rename` replaces prefixes, `change` edits the tensors before."""

    def write(
        model: LlavaForConditionalGeneration,
        directory: Path,
        rename: Renames = (),
        change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    ) -> Path:
        tensors = {}
        for name, tensor in model.state_dict().items():
            old, new = next(((old, new) for old, new in rename if name.startswith(old)), ("", ""))
            tensors[new + name.removeprefix(old)] = tensor.clone()
        if change is not None:
            change(tensors)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return write
