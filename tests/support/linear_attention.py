"""Linear attention (Gated DeltaNet) in float32 on CPUs, where vLLM 0.32.0 has it in bfloat16 alone.

Bfloat16 moves log-probabilities by 0.2, as much as some errors would. All else is vLLM's: which states a step begins
with and where it leaves them, how prompts are cut, what is cached. What computes in bfloat16 keeps vLLM's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

stock = gdn_attention.cpu_gdn_attention_core


def by_type(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    """What this module, once imported, puts in the place of vLLM's kernel: vLLM registers it with its first layer."""
    compute = in_float32 if mixed_qkv.dtype == torch.float32 else stock
    compute(mixed_qkv, b, a, core_attn_out, layer_name)


def in_float32(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    """As vLLM's ``cpu_gdn_attention_core``, token by token, for heads whose keys are as wide as their values.

    Args:
        mixed_qkv: (T, c) queries, keys and values of the tokens of a step, before their convolution.
        b, a: (T, h) of the strength with which a token is written, and of the decay.
        core_attn_out: (T, h, d_v) to be filled.
        layer_name: of the layer.
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule  # takes seconds

    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    metadata = context.attn_metadata[layer.prefix]
    windows, states = layer.kv_cache
    if not is_conv_state_dim_first():
        windows = windows.transpose(1, 2)
    decay = -layer.A_log.exp() * softplus(a + layer.dt_bias)
    starts = metadata.non_spec_query_start_loc.tolist()
    for index in range(metadata.num_decodes + metadata.num_prefills):
        tokens = slice(starts[index], starts[index + 1])
        slot = metadata.non_spec_state_indices_tensor[index]
        if index >= metadata.num_decodes and not metadata.has_initial_state[index]:
            windows[slot] = states[slot] = 0
        sequence = torch.cat([windows[slot], mixed_qkv[tokens].T], dim=1)
        windows[slot] = sequence[:, -windows.shape[2] :]
        mixed = silu(conv1d(sequence[None], layer.conv1d.weight, groups=len(sequence)))[0].T
        query, key, value = layer.rearrange_mixed_qkv(mixed)
        query, key = (heads.repeat_interleave(value.shape[2] // heads.shape[2], dim=2) for heads in (query, key))
        seen, state = torch_recurrent_gated_delta_rule(
            query,
            key,
            value,
            g=decay[None, tokens],
            beta=b[None, tokens].sigmoid(),
            initial_state=states[slot][None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[tokens], states[slot] = seen[0], state[0]


gdn_attention.cpu_gdn_attention_core = by_type
