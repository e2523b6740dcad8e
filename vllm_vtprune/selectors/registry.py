"""All methods, in display order."""

from collections.abc import Mapping
from types import MappingProxyType

from vllm_vtprune.selectors.adaptprune import AdaptPrune
from vllm_vtprune.selectors.avgpool import AvgPool
from vllm_vtprune.selectors.cdpruner import CDPruner
from vllm_vtprune.selectors.cover import CoverPruner
from vllm_vtprune.selectors.dart import DART
from vllm_vtprune.selectors.divprune import DivPrune
from vllm_vtprune.selectors.fastervlm import FasterVLM
from vllm_vtprune.selectors.hired import HiRED
from vllm_vtprune.selectors.last import Last
from vllm_vtprune.selectors.leverage import Leverage
from vllm_vtprune.selectors.maxpool3x3 import MaxPool
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.pool import Pool
from vllm_vtprune.selectors.prumerge import PruMerge
from vllm_vtprune.selectors.random3x3 import Random3x3
from vllm_vtprune.selectors.random_ import Random
from vllm_vtprune.selectors.resize import Resize
from vllm_vtprune.selectors.resprune import ResPrune
from vllm_vtprune.selectors.scope import SCOPE
from vllm_vtprune.selectors.skip import Skip
from vllm_vtprune.selectors.tome import ToMe
from vllm_vtprune.selectors.trim import TRIM
from vllm_vtprune.selectors.uniform import Uniform
from vllm_vtprune.selectors.visionzip import VisionZip
from vllm_vtprune.selectors.vispruner import VisPruner

_ALL: tuple[type[Method], ...] = (
    ResPrune, AdaptPrune, DivPrune, CDPruner, SCOPE, CoverPruner, Leverage, DART, FasterVLM, VisPruner, HiRED,
    VisionZip, PruMerge, TRIM, ToMe, Pool, Resize, Random, Uniform, Random3x3, MaxPool, AvgPool, Skip, Last,
)  # fmt: skip

METHODS: Mapping[str, type[Method]] = MappingProxyType({cls.model_fields["method"].default: cls for cls in _ALL})
"""All methods, by the value of ``method`` in a policy."""

SELECTORS: Mapping[str, type[Method]] = MappingProxyType({n: m for n, m in METHODS.items() if not m.preprocesses})
"""The methods that select tokens of an encoded image."""
