"""Pictures with questions and known answers: they train the demo model and measure every method.

A scene depends only on split and seed. `make_scene` lays it out (shapes, handwritten digits, words and numbers, from
one thing on a plain ground to dozens), `paint` renders it, `ask` makes questions, `patch_labels` labels each 14 x 14
patch. Training, validation and test share no layout, no background and no word or number; see `splits`.
"""

from vllm_vtprune_evaluation.scenes.labels import FIELDS, code_size, codes, patch_labels, patches_of
from vllm_vtprune_evaluation.scenes.layout import PATCH, Item, Scene, make_scene
from vllm_vtprune_evaluation.scenes.painting import paint
from vllm_vtprune_evaluation.scenes.questions import KINDS, Question, ask, pack
from vllm_vtprune_evaluation.scenes.splits import SPLITS, Split

__all__ = [
    "FIELDS",
    "KINDS",
    "PATCH",
    "SPLITS",
    "Item",
    "Question",
    "Scene",
    "Split",
    "ask",
    "code_size",
    "codes",
    "make_scene",
    "pack",
    "paint",
    "patch_labels",
    "patches_of",
]
