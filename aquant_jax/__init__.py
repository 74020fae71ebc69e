"""AQuant for JAX: post-training quantization with learned rounding borders."""

import aquant_jax.requirements  # noqa: F401  first: it tells old versions in one line

# isort: split
from aquant_jax import recipe as recipes
from aquant_jax.allocation.allocate import allocate
from aquant_jax.allocation.choices import Budget, Choice
from aquant_jax.allocation.latency import layer_latencies
from aquant_jax.allocation.result import Allocation
from aquant_jax.arithmetic.border import register as register_border
from aquant_jax.deployment.checkpoint import restore, save, summary
from aquant_jax.deployment.layer_summary import LayerSummary
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.layers.backend import Backend
from aquant_jax.layers.compiler import Compiler
from aquant_jax.plan.description import describe
from aquant_jax.plan.prepare import prepare
from aquant_jax.quantize import quantize, quantize_seeds
from aquant_jax.recipe import Override, Recipe, Reconstruction
from aquant_jax.reconstruction.observer import (
    LogObserver,
    Observer,
    Observers,
    TerminalObserver,
)
from aquant_jax.reconstruction.report import BlockReport, FinetuneReport
from aquant_jax.reporting.report import report
from aquant_jax.sensitivity import Sensitivity, sensitivity

__version__ = "0.2.0"

__all__ = [
    "Allocation",
    "Backend",
    "BlockReport",
    "Budget",
    "Choice",
    "Compiler",
    "FinetuneReport",
    "InputError",
    "LayerSummary",
    "LogObserver",
    "Observer",
    "Observers",
    "Override",
    "Quantized",
    "Recipe",
    "Reconstruction",
    "ReconstructionError",
    "Sensitivity",
    "TerminalObserver",
    "allocate",
    "describe",
    "layer_latencies",
    "prepare",
    "quantize",
    "quantize_seeds",
    "recipes",
    "register_border",
    "report",
    "restore",
    "save",
    "sensitivity",
    "summary",
]
