"""Decoders (OPT, LLaMA-like, GPT-NeoX), from Hugging Face folders or with random weights."""

from alisa_jax.models.checkpoint import CheckpointError, Model, load, save
from alisa_jax.models.decoder import Decoder, ModelConfig, RopeScaling
from alisa_jax.models.settings import CheckpointWarning
from alisa_jax.models.shapes import SHAPES

__all__ = [
    "SHAPES",
    "CheckpointError",
    "CheckpointWarning",
    "Decoder",
    "Model",
    "ModelConfig",
    "RopeScaling",
    "load",
    "save",
]
