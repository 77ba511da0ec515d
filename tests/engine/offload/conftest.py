"""The models and engines of tests/engine."""

from tests.engine.conftest import engine, random_model, story_ids, trained

__all__ = ["engine", "random_model", "story_ids", "trained"]
