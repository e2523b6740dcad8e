"""The papers' ablation tables; `vtprune eval --ablation NAME` runs one.

Each row changes one parameter of the full method and is named after the paper's setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vllm_vtprune_evaluation.arms import Arm, energy, fixed

Rows = Mapping[str, Mapping[str, Any]]

RESPRUNE_COMPONENTS: Rows = {
    "full": {},
    "no text clean-up": {"text": {"clean": False}},
    "no text guidance": {"alpha": 0},
    "relevance only": {"rank_by": "relevance"},
}
RESPRUNE_ALPHA: Rows = {f"alpha {alpha}": {"alpha": alpha} for alpha in (0, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0)}
RESPRUNE_GATE: Rows = {
    "minmax, nouns with modifiers": {},
    "minmax, nouns alone": {"text": {"modifiers": False}},
    "minmax, every word": {"text": {"clean": False}},
    "clip, nouns with modifiers": {"gate": "clip"},
    "clip, nouns alone": {"gate": "clip", "text": {"modifiers": False}},
    "clip, every word": {"gate": "clip", "text": {"clean": False}},
    "no text": {"alpha": 0},
}
RESPRUNE_RELEVANCE: Rows = {
    "max over text tokens": {"relevance": "max"},
    "mean over text tokens": {"relevance": "mean"},
    "mean text token": {"relevance": "mean_token"},
}
RESPRUNE_SEED: Rows = {
    "CLS attention": {"seed_token": "cls"},
    "norm": {"seed_token": "norm"},
    "relevance": {"seed_token": "relevance"},
    "mean token": {"seed_token": "mean"},
    "grid centre": {"seed_token": "center"},
}
FEATURES: Rows = {features: {"features": features} for features in ("projected", "encoder", "both")}
ADAPTPRUNE_CUES: Rows = {  # (a), plain importance, is top-k CLS attention here
    "(a) importance only": {"correction": False, "distance": False, "similarity": False},
    "(b) correction": {"distance": False, "similarity": False},
    "(c) correction, distance": {"similarity": False},
    "(d) full": {},
}
ADAPTPRUNE_STRATEGIES: Rows = {  # but for FitPrune, which prunes inside the language model
    "AdaptPrune": {"method": "adaptprune"},
    "(b) skip": {"method": "skip"},
    "(c) random": {"method": "random"},
    "(d) random 3x3": {"method": "random3x3"},
    "(e) max-pooling 3x3": {"method": "maxpool3x3"},
    "(f) average-pooling": {"method": "avgpool"},
    "(g) last": {"method": "last"},
}


@dataclass(frozen=True)
class Ablation:
    """One table of a paper.

    Attributes:
        title: paper and table.
        rows: row name -> changed policy fields.
        method: method of rows that name none.
        keeps: token budgets.
    """

    title: str
    rows: Rows
    method: str
    keeps: tuple[int, ...]

    def arms(self) -> list[Arm]:
        """Every row at every budget."""
        return [
            Arm(f"{row} @{keep}", {"method": self.method, "budget": fixed(keep), **change}, row, keep)
            for keep in self.keeps
            for row, change in self.rows.items()
        ]


FEW = (64, 36, 18)  # of 576, or of the 144 of `--merged`
TENTH = (58,)  # of 576: AdaptPrune's ablations prune 90 %

ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "resprune-components": Ablation("ResPrune, Table IV", RESPRUNE_COMPONENTS, "resprune", (128, 64)),
        "resprune-alpha": Ablation("ResPrune, Table V", RESPRUNE_ALPHA, "resprune", (128, 64)),
        "resprune-gate": Ablation("ResPrune's gate, in no paper", RESPRUNE_GATE, "resprune", (128, 64, 32)),
        "resprune-relevance": Ablation("ResPrune, Table VI", RESPRUNE_RELEVANCE, "resprune", (128,)),
        "resprune-seed": Ablation("ResPrune, Table VII", RESPRUNE_SEED, "resprune", (128,)),
        "resprune-features": Ablation("what ResPrune compares tokens by, in no paper", FEATURES, "resprune", FEW),
        "divprune-features": Ablation("what DivPrune compares tokens by, in no paper", FEATURES, "divprune", FEW),
        "adaptprune-cues": Ablation("AdaptPrune, Table 4", ADAPTPRUNE_CUES, "adaptprune", TENTH),
        "adaptprune-strategies": Ablation("AdaptPrune, Table 5", ADAPTPRUNE_STRATEGIES, "adaptprune", TENTH),
    }
)
"""By name. E-AdaPrune's Table 1 is `vtprune eval --methods visionzip --in-llm --adaptive --keep 128,64`, but for
PyramidDrop: on a model of six layers its mean over the layers is 192 tokens or more, the rank of the features."""

SOLVERS = "eadaprune-solver"  # E-AdaPrune, Table 4; its threshold has to be found first


def solver_arms(threshold: float, keep: int, dimension: int) -> list[Arm]:
    """The rows of E-AdaPrune's Table 4: VisionZip at one energy threshold with different solvers.

    Args:
        threshold: energy threshold that keeps ``keep`` tokens on average with the exact solver.
        keep: mean tokens.
        dimension: width of the encoder's features; the paper's ranks are scaled from its 1,024.
    """
    solvers: dict[str, dict[str, Any]] = {"exact": {"solver": "exact"}}
    for rank in (500, 400, 300):
        for power in (2, 1, 0):
            scaled_rank = round(rank / 1024 * dimension)
            solvers[f"rSVD, {scaled_rank} of {dimension}, q = {power}"] = {
                "solver": "rsvd",
                "rank": scaled_rank,
                "power_iterations": power,
            }
    return [
        Arm(row, {"method": "visionzip", "budget": {**energy(threshold), **solver}}, row, keep, adaptive=True)
        for row, solver in solvers.items()
    ]
