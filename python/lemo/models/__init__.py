"""Elimination in Hugging Face causal language models.

Read from the inside out: `architectures` (where a model keeps its parts), `batch` (what the layers
know of their rows), `sub_blocks` (attention and MLP on the rows that they keep), `left_out` (rows
that are computed without gradients), `unit` (what runs as one piece), `execution` (three ways to
run it), `recompute` (the second way's autograd node), `decoder` (the layers), `loss`. From the
outside in: `enable` (what a user calls), `replaced_forward` and `arguments` (a call of the model),
`training_forward` (what answers it), `labels`, `outputs`, `interception` and `verify` (nothing may
be silently wrong), `callback` (trainers). `path` is what `enable` asks of a path: `native`, which
all of these make up, or `generic`, which runs a model's own layers. `capture` runs the dense model
for exact scores.
"""
