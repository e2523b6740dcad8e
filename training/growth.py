"""Beginning with an earlier model: its weights in one that has more layers and a fainter code of position.

A new layer adds nothing at first: its output projections are zero. A fainter code of position is a linear change of the
space that all layers read and write, so it is put into the weights; only the lengths that normalisation divides by
differ, and training evens that out.
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

LOOKED = -2  # the layer of the earlier model whose attention was trained


def begin_with(model: LlavaForConditionalGeneration, checkpoint: Path, fainter: float = 1.0) -> None:
    """Put the weights of an earlier model into `model`, in place.

    Args:
        model: of the same widths, with as many layers in its language model or more. New ones go before the layer whose
            attention is trained (`LOOKING`), and behind the last one.
        checkpoint: a directory that `save_llava_checkpoint` wrote.
        fainter: the scale of the code of position, as a multiple of the earlier model's.

    Raises:
        KeyError, RuntimeError: the checkpoint is of another architecture, or of other widths.
    """
    state = model.state_dict()
    inside = {released(name, NAMES): name for name in state}
    earlier = {inside[name]: weight.float() for name, weight in load_file(checkpoint / "model.safetensors").items()}
    layers = model.config.text_config.num_hidden_layers
    known = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in earlier if "language_model.layers" in name)
    places = _places(known, layers)
    for name, weight in state.items():
        place = name.split(".layers.")
        if "language_model" not in name or len(place) == 1:
            weight.copy_(earlier[name])
            continue
        index, rest = place[1].split(".", 1)
        source = places[int(index)]
        if source is not None:
            weight.copy_(earlier[f"{place[0]}.layers.{source}.{rest}"])
        elif rest.startswith(("self_attn.o_proj", "mlp.down_proj")):
            weight.zero_()
    model.load_state_dict(state)
    if fainter != 1.0:
        _rescale_position(model, fainter)


def _places(known: int, layers: int) -> list[int | None]:
    """For each layer, the earlier one that it takes its weights from."""
    after = -LOOKING - 1  # layers behind the one whose attention is trained
    looking = known + LOOKED
    places: list[int | None] = [*range(known)]
    places += [None] * (after - (known - 1 - looking))
    return places[:looking] + [None] * (layers - len(places)) + places[looking:]


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
