"""Describe the machine of a measurement."""

from __future__ import annotations

import os
from typing import Any

import torch
from cpuinfo import get_cpu_info  # vLLM brings it


def machine() -> dict[str, Any]:
    """CPU, vector instructions, native bfloat16, usable cores, GPU, torch version.

    CPUs without native bfloat16 emulate it at a fraction of float32's speed, so ratios in bfloat16 are comparable only
    between machines with the same value.
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
