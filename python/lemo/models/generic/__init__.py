"""The generic path: a model's own layers, unchanged, on the kept rows only.

Where one kept set serves all layers, a causal LM of Transformers needs nothing of lemo's
architectures: its own modules run on the kept rows, packed, at their original positions, and only
attention is lemo's (docs/design/models.md). Read from the inside out: `parts` (what is asked of a
model), `attention` (what its layers call), `kept` (the rows of a batch that are kept), `layout`
(whether the model uses them as it should), `head` (the loss), `forward` (a training pass),
`verify` (`handle.verify`).
"""
