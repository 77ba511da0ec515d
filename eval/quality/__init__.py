"""One sample for many methods, paired differences, and what `eval.compare` and `eval.sparsity` measure."""
