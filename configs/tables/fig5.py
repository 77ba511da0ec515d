"""The paper's Figure 5 on the bundled model: attention maps of 16 tokens, and the weight on the first.

    python -m eval.reproduce --only=fig5

Expected time: Figures 3, 4, 5 and 10 share one sample and their records. All four took 38 s together, compilation included,
on 2 CPU cores that other work shared (39 s of core time). FULL has eight times as many windows.

Expected: in layer 1 the first token gets 48 % of the attention of the first 16 tokens, in the others less than 4 %; after
128 tokens 1.7 % and 0.0 %, so this model has no lasting sink.
"""

QUICK = dict(
    context_tokens=384,
    windows=8,
    skip_tokens=128,
)
FULL = QUICK | dict(windows=64)
