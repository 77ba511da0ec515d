"""How the bundled model is trained: what a run sees, and how it learns."""
