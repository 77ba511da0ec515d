"""Runs whose cache is placed by a controller: the engine, its runs, their programs and settings."""
