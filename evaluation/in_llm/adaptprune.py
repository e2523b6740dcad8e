"""AdaptPrune with its own cues: attention and keys of the language model.

"Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models". The suppression is that of the plugin's
`adaptprune`, which has to do without these cues. The layers, counted from 0, and the constants are those of the
published code: tokens leave before layer 2, by the attention of layer 1 and the keys of layer 2. The keys are those
that the layer would compute, of all heads, before they are rotated by position; the published code leaves out the
layer's normalisation before it projects.
"""

from dataclasses import dataclass

from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_evaluation.in_llm.pruning import DropOnce, Entrance

POLICY = PruningPolicy.parse(
    {"method": "adaptprune", "importance": "cls", "sigma_d": 1.5, "sigma_s": 0.05, "radius": 5.0}
)


@dataclass(frozen=True)
class AdaptPrune(DropOnce):
    """The k tokens stay that soft suppression picks from the attention of the last token of the prompt.

    Attributes:
        budget: k, the tokens that stay.
        after: layers that see all tokens, 1 or more and fewer than the model has. The attention is that of the last of
            them, the keys are those of the next.
    """

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        cues = VisualFeatures(
            encoder=entrance.features.encoder,
            embeds=entrance.keys,
            grid=entrance.features.grid,
            cls_attention=entrance.attention_before,
        )
        picks = POLICY.chosen.select(cues, count, None)
        assert isinstance(picks, Tensor)
        return picks
