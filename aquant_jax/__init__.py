"""AQuant for JAX: post-training quantization with learned rounding borders."""

from aquant_jax import recipe as recipes
from aquant_jax.border import register as register_border
from aquant_jax.checkpoint import restore, save, summary
from aquant_jax.compiler import Compiler
from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.network import describe, prepare
from aquant_jax.pipeline import quantize
from aquant_jax.quantized import Quantized
from aquant_jax.recipe import Override, Recipe
from aquant_jax.report import BlockReport, LayerSummary
from aquant_jax.sensitivity import Sensitivity, sensitivity

__version__ = "0.1.0"

__all__ = [
    "BlockReport",
    "Compiler",
    "InputError",
    "LayerSummary",
    "Override",
    "Quantized",
    "Recipe",
    "ReconstructionError",
    "Sensitivity",
    "describe",
    "prepare",
    "quantize",
    "recipes",
    "register_border",
    "restore",
    "save",
    "sensitivity",
    "summary",
]
