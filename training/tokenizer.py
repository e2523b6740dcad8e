"""The demo model's tokenizer: common words whole, everything in capitals and digits character by character.

Words in the pictures are in capitals, so the model spells what it reads and can spell words that it never saw.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_vtprune_checkpoints import words
from vllm_vtprune_checkpoints.llava import FIRST_TOKENS, llava_tokenizer
from vllm_vtprune_evaluation.scenes import make_scene, pack

VOCABULARY = 1024
ROLES = ("USER:", "ASSISTANT:")  # of the chat template; else they would be spelled too
IMAGE_ID, PAD_ID = VOCABULARY - 2, VOCABULARY - 1
BOS_ID, EOS_ID = 1, 2
CAPITALS = r"[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"  # "What" stays whole


def scene_tokenizer(earlier: Path | None = None) -> PreTrainedTokenizerFast:
    """Byte-level, so any text survives the round trip; trained on questions about scenes, then on common words.

    That of an `earlier` checkpoint is taken as it is, where there is one.
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
