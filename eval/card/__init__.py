"""The parts of `eval.gpu`: what is measured on a card, the process that measures and the one that watches it."""
