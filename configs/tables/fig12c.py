"""Figure 12c: what SWA, dynamic scheduling and compression add to FlexGen, modelled.

    python -m eval.reproduce --only=fig12c

Nothing of it runs: 4 seconds of one core. Eleven of twelve predictions are within 25 %; compression helps less at
higher sparsity here, where the paper has it help more. QUICK is FULL.
"""

QUICK = dict()
FULL = dict()
