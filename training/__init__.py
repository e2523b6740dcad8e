"""How the demo model is trained: `python -m training`, or `make train-demo`.

Trained end to end on pictures, a model of this size stays at chance for long: the encoder is noise, so the language
model never finds the picture. So the two learn apart, and meet when each is good at its part (`stages.py`):

1. `language`: the language model answers questions about symbolic codes of patches in place of a picture. Codes are
   what a perfect encoder would say of each patch (`evaluation/scenes/labels.py`), a little blurred. 24 questions
   with their answers are packed behind each picture, so its many tokens are computed once for all of them. The canvas
   grows from 8 x 8 patches to 24 x 24: a small one has the same questions for a fraction of the tokens.
2. `tower`: encoder and projector learn to emit those codes, on pages full of words, numbers and shapes; every patch is
   an example.
3. `joint`: all of it on pictures, with the loss of the tower kept as a fifth.

While it answers, one layer's attention is held to what the question is about (`model.Looks`): with it, existence was at
87 % after 260 steps of 8 scenes, without it at chance after 520. Counting needs more than that. A head looks at the
centres of all that is counted, each with an eighth of its attention and the rest at the prompt's start, so that what it
reads grows with their number. That look weighs four times as much as others, counting comes three times as often, and
any colour or shape is counted, so that a small canvas has questions to count by. Relations and positions look at
centres too: the nearest patches of two things may lie in one column.

The visual tokens' positions are numbered anew for each picture, squeezed, spread and shifted, so that the answer can
only come from what tokens say of their place (`gate.py` checks it). All tokens are always there: pruning is not trained
for.

Muon instead of Adam: after 30 steps of 8 scenes the loss of the language stage was 1.26 against 1.77, for 0.3 s a step.
Embeddings and all that is no matrix inside a layer take Adam's steps at a tenth of the rate: at the whole rate letters
were not learnt (`optimizer.py`).

Where the time goes (`schedule.py`). Measured on two cores of an AMD EPYC with AVX-512-BF16, seconds for a step on one
core, in bfloat16: language 1.6 (8 scenes of 8 x 8) to 1.7 (4 of 24 x 24), tower 0.9 (4 pictures), joint 2.7 (8
pictures, on two). Products are in float32 where a CPU has no instructions for bfloat16, which takes about twice as
long. Two threads are only 1.5 times as fast as one, so `language` and `tower` run side by side, one core each, and a
step of `joint` is divided between two threads. `--hours` lengthens all stages alike.

The model in the package is the second one, and went on from the first, which had four layers, a code of position of
twice the size, and was at 82 % (16 % of counts, 59 % of readings):

    python -m training --hours 1.2 --rate 0.6 --begin-with FIRST --fainter 0.5 --out build/training
    python -m training joint --hours 0.86 --rate 0.7 --begin-with FIRST --fainter 0.5 --out build/training

where FIRST is `vllm_vtprune/demo/model` of commit 098bbcc. (The first command was ended before its own `joint`.) The
first model took two hours, in which much of what is written above was found out, so neither is what one uninterrupted
run from nothing gives. The logs of the second are in `docs/benchmarks/training/`.
"""
