"""The figures of the paper that `eval.reproduce` makes, one module each."""
