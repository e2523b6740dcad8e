"""Vision towers that run in the API process, before vLLM's engine, so that pruning can choose tokens.

Nothing in this package imports vLLM.
"""

from vllm_vtprune.towers.base import VisionTower, load_tower
from vllm_vtprune.towers.weights import CheckpointReader, TowerError

__all__ = ["CheckpointReader", "TowerError", "VisionTower", "load_tower"]
