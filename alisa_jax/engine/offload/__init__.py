"""Runs whose cache a controller places: `Placement`, the runs, their programs and settings."""
