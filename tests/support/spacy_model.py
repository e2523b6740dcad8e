"""A spaCy model made on the spot, called as the one that the image installs, with pipes of the same names."""

import subprocess
import sys
from pathlib import Path

import spacy
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import fix_random_seed

from vllm_vtprune.text import SPACY_MODEL

VERSION = "3.8.0"
TAGGED = {
    "Where is the dog ?": "X X X NN X",
    "Is the bus red ?": "X X NN NN X",  # to the embedded pipeline, red is no noun
    "What is on the table ?": "X X X X NN X",
}
"""What the tagger learns; its tag NN stands for nouns."""
NOT_READY = ("parser", "ner", "lemmatizer")
"""Pipes that fail where they are run, as nothing was learnt for them. Nouns do not need them."""


def wheel(folder: Path) -> Path:
    """Make the model into a wheel, as spaCy's own are made. Returns its path."""
    fix_random_seed(0)
    language = spacy.blank("en")
    language.add_pipe("tagger")
    examples = []
    for sentence, tags in TAGGED.items():
        words = sentence.split()
        examples.append(Example.from_dict(Doc(language.vocab, words), {"words": words, "tags": tags.split()}))
    language.initialize(lambda: examples)
    for _ in range(30):
        language.update(examples)
    language.add_pipe("attribute_ruler").add([[{"TAG": "NN"}]], {"POS": "NOUN"})
    for name in NOT_READY:
        language.add_pipe("trainable_lemmatizer" if name == "lemmatizer" else name, name=name)
    language.meta |= {"name": SPACY_MODEL.removeprefix("en_"), "version": VERSION}
    folder.mkdir(exist_ok=True)
    language.to_disk(folder / "model")
    source = folder / f"{SPACY_MODEL}-{VERSION}"
    for command in (
        ["spacy", "package", folder / "model", folder, "--build", "none"],
        ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made
