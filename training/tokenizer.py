"""The demo model's tokenizer: common words as one token, capitals and digits character by character.

Words in pictures are in capitals, so the model spells them, and can spell words that training never showed.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_vtprune_checkpoints import words
from vllm_vtprune_checkpoints.llava import FIRST_TOKENS, llava_tokenizer
from vllm_vtprune_evaluation.scenes import make_scene, pack

VOCABULARY = 1024
ROLES = ("USER:", "ASSISTANT:")  # of the chat template; would be spelled otherwise
IMAGE_ID, PAD_ID = VOCABULARY - 2, VOCABULARY - 1
BOS_ID, EOS_ID = 1, 2
CAPITALS = r"[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"  # "What" stays whole


def scene_tokenizer(earlier: Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, trained on questions about scenes and on common words; any text survives the round trip.

    With an `earlier` checkpoint, load its tokenizer instead.
    """
    if earlier is not None:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(earlier)
        return loaded
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CAPITALS), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ROLES) - 2,
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    questions = [question for seed in range(200) for question in pack(make_scene("train", seed), 20)]
    asked = [f"{question.text} {question.answer}" for question in questions]
    tokenizer.train_from_iterator(asked * 20 + list(words.sentences(2000)), trainer)
    return llava_tokenizer(0, base=tokenizer, plain=ROLES)
