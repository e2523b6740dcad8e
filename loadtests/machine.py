"""What numbers were measured on."""

from __future__ import annotations

import os
from typing import Any

import torch
from cpuinfo import get_cpu_info  # vLLM brings it


def machine() -> dict[str, Any]:
    """Processor, its vector instructions and whether it multiplies bfloat16, cores this process may use, GPU, torch.

    A processor without bfloat16 has it emulated, at a small part of float32's speed: ratios in bfloat16 carry over only
    between machines of the same answer.
    """
    cpu = get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw", cpu["arch"]),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": any("bf16" in flag for flag in cpu.get("flags", [])),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
