"""The array type of parameters: the library takes a NumPy array wherever it takes a JAX array."""

from __future__ import annotations

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
