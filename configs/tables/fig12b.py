"""Figure 12b: the whole run with and without recomputation, modelled.

    python -m eval.reproduce --only=fig12b

Nothing of it runs: 4 seconds of one core, less after Figure 12a. Recomputation gains 1.13 to 1.16 times (the paper:
1.19 to 1.25); all seconds are within 9 %. QUICK is FULL.
"""

QUICK = dict()
FULL = dict()
