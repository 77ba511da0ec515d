"""The model of tests/engine that is made of random weights."""

from tests.engine.conftest import random_model

__all__ = ["random_model"]
