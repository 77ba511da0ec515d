"""Numbers without a run: sizes and machines, and the model that the paper's figures are held against."""
