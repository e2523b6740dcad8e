"""How the demo model is trained: `python -m training`, or `make train-demo`.

Trained end to end on pictures, a model of this size stays at chance for long: the encoder is noise, so the language
model never finds the picture. So the two learn apart, and meet when each is good at its part (`stages.py`):

1. `language`: the language model answers questions about symbolic codes of patches in place of a picture. Codes are
   what a perfect encoder would say of each patch (`vllm_vtprune/demo/scenes/labels.py`), a little blurred. 24 questions
   with their answers are packed behind each picture, so its many tokens are computed once for all of them. The canvas
   grows from 8 x 8 patches to 24 x 24: a small one has the same questions for a fraction of the tokens.
2. `tower`: encoder and projector learn to emit those codes, on pages full of words, numbers and shapes; every patch is
   an example.
3. `joint`: all of it on pictures, with the loss of the tower kept as a fifth.

While it answers, one layer's attention is held to what the question is about (`model.Looks`): with it, existence was
at 87 % after 260 steps of 8 scenes, without it at chance after 520.

The visual tokens' positions are numbered anew for each picture, squeezed, spread and shifted, so that the answer can
only come from what tokens say of their place (`gate.py` checks it). All tokens are always there: pruning is not trained
for.

Muon instead of Adam: after 30 steps of 8 scenes the loss of the language stage was 1.26 against 1.77, for 0.3 s a step.
Embeddings and all that is no matrix inside a layer take Adam's steps at a tenth of the rate: at the whole rate letters
were not learnt (`optimizer.py`).

Where the time goes (`schedule.py`). Measured on two cores of an AMD EPYC without AVX-512, seconds for a step on one
core: language 1.45 (8 scenes of 8 x 8) to 1.95 (4 of 24 x 24), tower 1.3 (4 pictures), joint 3.5 (8 pictures, on two).
An allocator that gives memory back to the system costs 5 % more: jemalloc need not. Two threads are only 1.5 times as
fast as one, so `language` and `tower` run side by side, one core each, and a step of `joint` is divided between two
threads. `--hours` lengthens all stages alike.

The model in the package is not what one uninterrupted run of this gives. It took two hours, in which what is written
above was found out: where to look for letters was off by one until step 820 of `language`; full pages and Adam's tenth
came in the middle of `tower` and `language`; `joint` was begun at step 1,840 of 2,630 of `language`, after values for
left and right had been put in by hand. The log is in `docs/benchmarks/training/`.
"""
