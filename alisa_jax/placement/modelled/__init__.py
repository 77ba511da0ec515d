"""Placement in numbers alone: costs, the planner, the simulator; no run needs them."""
