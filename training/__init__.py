"""Train the demo model: `python -m training`, or `make train-demo`.

A model of this size, trained end to end on pictures, stays at chance for long: the encoder emits noise, so the language
model learns nothing from it. Therefore the two are first trained apart (`stages.py`):

1. `language`: the language model answers questions about symbolic patch codes instead of pictures. A code is what a
   perfect encoder would emit for a patch (`evaluation/scenes/labels.py`), slightly blurred. 24 questions and answers
   follow each picture in one row, so its tokens are computed once. The canvas grows from 8 x 8 to 24 x 24 patches:
   small ones have the same questions for a fraction of the tokens.
2. `tower`: vision encoder and projector learn to emit those codes, on pages full of words, numbers and shapes; every
   patch is an example.
3. `joint`: everything, on pictures; a fifth of the loss of `tower` is kept.

The attention of one layer is supervised during answers: it should be on what the question asks about (`model.Looks`).
With it, existence was at 87 % after 260 steps of 8 scenes; without it, at chance after 520. Counting needs more: a head
attends to the centres of all counted things, an eighth of its attention each and the rest to the prompt's start, so
that its output grows with their number. This target weighs four times as much as others, counting questions come three
times as often, and they count any colour or shape, so that small canvases have them, too. Relations and positions
attend to centres as well, because the nearest patches of two things may share a column.

The positions of the visual tokens are renumbered for each picture (squeezed, spread and shifted), so that answers
depend only on what the tokens themselves encode (`gate.py` checks it). All tokens are always present: the model is not
trained for pruning.

The optimizer is Muon instead of Adam: after 30 steps of 8 scenes the loss of the language stage was 1.26 instead of
1.77, for 0.3 s per step. Embeddings and everything else that is no matrix inside a layer use Adam at a tenth of the
rate: at the full rate, letters were not learnt (`optimizer.py`).

Time (`schedule.py`), measured on two cores of an AMD EPYC with AVX-512-BF16, in seconds per step on one core, in
bfloat16: language 1.6 (8 scenes of 8 x 8) to 1.7 (4 of 24 x 24), tower 0.9 (4 pictures), joint 2.7 (8 pictures, on two
cores). CPUs without bfloat16 instructions use float32, which takes about twice as long. Two threads are only 1.5 times
as fast as one, so `language` and `tower` run side by side on one core each, and a step of `joint` is split between two
threads. `--hours` scales all stages alike.

The demo model is the second one. It started from the first, which had four layers and a position code of twice the
size, and reached 82 % (16 % of counts, 59 % of readings):

    python -m training --hours 1.2 --rate 0.6 --begin-with FIRST --fainter 0.5 --out build/training
    python -m training joint --hours 0.86 --rate 0.7 --begin-with FIRST --fainter 0.5 --out build/training

where FIRST is `vllm_vtprune/demo/model` of commit 098bbcc. (The first command was stopped before its own `joint`.) The
first model took two hours of training with changing settings, so neither equals one uninterrupted run from scratch. The
logs of the second are in `docs/benchmarks/training/`.
"""
