"""Initialise a model from an earlier one with fewer layers and a larger position code.

A new layer initially adds nothing: its output projections are zero. Scaling the position code is a linear change of the
residual space, so it is folded into the weights; only the norms change, which training corrects.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from training.model import LOOKING, Codebook
from vllm_vtprune_checkpoints.llava import NAMES
from vllm_vtprune_checkpoints.writing import released
from vllm_vtprune_evaluation.scenes import code_size
from vllm_vtprune_evaluation.scenes.labels import POSITION_SIZE

LOOKED = -2  # layer of the earlier model with supervised attention


def begin_with(model: LlavaForConditionalGeneration, checkpoint: Path, fainter: float = 1.0) -> None:
    """Copy the weights of an earlier model into `model`, in place.

    Args:
        model: a model of the same widths, with at least as many layers in its language model. New layers go before the
            layer with supervised attention (`LOOKING`), and after the last one.
        checkpoint: a directory of `save_llava_checkpoint`.
        fainter: scale of the position code, relative to the earlier model's.

    Raises:
        KeyError, RuntimeError: the checkpoint has another architecture or other widths.
    """
    state = model.state_dict()
    inside = {released(name, NAMES): name for name in state}
    earlier = {inside[name]: weight.float() for name, weight in load_file(checkpoint / "model.safetensors").items()}
    layers = model.config.text_config.num_hidden_layers
    in_language_model = [name for name in earlier if "language_model.layers" in name]
    earlier_layers = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in in_language_model)
    sources = _sources(earlier_layers, layers)
    for name, weight in state.items():
        prefix, *in_layer = name.split(".layers.")
        if "language_model" not in name or not in_layer:
            weight.copy_(earlier[name])
            continue
        index, suffix = in_layer[0].split(".", 1)
        source = sources[int(index)]
        if source is not None:
            weight.copy_(earlier[f"{prefix}.layers.{source}.{suffix}"])
        elif suffix.startswith(("self_attn.o_proj", "mlp.down_proj")):
            weight.zero_()
    model.load_state_dict(state)
    if fainter != 1.0:
        _rescale_position(model, fainter)


def _sources(earlier_layers: int, layers: int) -> list[int | None]:
    """For each layer, the index of the earlier layer with its weights; None for a new layer."""
    after = -LOOKING - 1  # layers after the one with supervised attention
    looking = earlier_layers + LOOKED
    sources: list[int | None] = [*range(earlier_layers)]
    sources += [None] * (after - (earlier_layers - 1 - looking))
    return sources[:looking] + [None] * (layers - len(sources)) + sources[looking:]


@torch.no_grad()
def _rescale_position(model: LlavaForConditionalGeneration, scale: float) -> None:
    rows = Codebook().rows[code_size() - POSITION_SIZE :]
    plane = rows.T @ rows
    change = torch.eye(len(plane)) + (scale - 1) * plane
    back = torch.eye(len(plane)) + (1 / scale - 1) * plane
    projector = model.model.multi_modal_projector.linear_2
    projector.weight.copy_(change @ projector.weight)
    projector.bias.copy_(change @ projector.bias)
    llama = model.model.language_model
    llama.embed_tokens.weight.copy_(llama.embed_tokens.weight @ change)

    def read(linear: nn.Linear, norm: Tensor) -> None:
        linear.weight.copy_(linear.weight * norm @ back / norm)

    for layer in llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            read(linear, layer.input_layernorm.weight)
        for linear in (mlp.gate_proj, mlp.up_proj):
            read(linear, layer.post_attention_layernorm.weight)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(change @ linear.weight)
    read(model.lm_head, llama.norm.weight)
