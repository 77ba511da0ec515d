"""Numbers without a run: shapes, machines, workloads, and the model of the paper's systems."""
