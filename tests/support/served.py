"""vLLM's processor and model of a checkpoint in this process, without an engine: what a model runner works with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.support.engines import join_world


@dataclass(frozen=True)
class Served:
    """The whole model with the checkpoint's weights, in float32 on the CPU."""

    processor: Any
    model: Any


@contextmanager
def served(checkpoint: Path) -> Iterator[Served]:
    """Load the model as a worker does, under the class that the plugin registers."""
    load_general_plugins()
    options: dict[str, Any] = dict(dtype="float32", max_model_len=2048, enforce_eager=True, seed=0)
    config = EngineArgs(model=str(checkpoint), **options).create_engine_config()
    join_world()
    with set_current_vllm_config(config):
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        yield Served(MULTIMODAL_REGISTRY.create_processor(config.model_config), model.eval())
