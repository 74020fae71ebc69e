"""The choices of a layer, and the budget that an allocation keeps to."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS
from aquant_jax.errors import InputError, check_type

COSTS = ("bytes", "average_bits", "bit_operations", "latency", "coefficients")
LIMITS = (*COSTS, "degradation")  # the fields of a budget of which exactly one is set


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to quantize a layer and its input.

    In words, ``a16`` is an input in float, whatever its dtype.

    >>> import aquant_jax as aq
    >>> str(aq.Choice(4, 8)), str(aq.Choice(3, 3, "linear", "channel"))
    ('w4a8', 'w3a3 linear channel')
    >>> str(aq.Choice(4)), str(aq.Choice())
    ('w4a16', 'float')

    Attributes:
      weight_bits: 2 to 8; None leaves weights and input in float.
      act_bits: of the layer's input, 2 to 8; None leaves the input in float (weights only).
      border: border function of the input, "nearest" for none, or None for the recipe's.
      border_granularity: of that border, or None for the recipe's.
    """

    weight_bits: int | None = None
    act_bits: int | None = None
    border: str | None = None
    border_granularity: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            whole = isinstance(bits, numbers.Integral) and not isinstance(bits, bool)
            if bits is not None and not (whole and bits in range(MIN_BITS, MAX_BITS + 1)):
                raise InputError(
                    f"choice: {name} is {bits!r}; it must be a whole number of 2 to 8, or None"
                )
            if bits is not None:  # one of NumPy would overflow
                object.__setattr__(self, name, int(bits))
        if self.weight_bits is None and self.act_bits is not None:
            raise InputError(
                f"choice: act_bits is {self.act_bits} with float weights; a layer of float weights "
                "has a float input"
            )
        self._check_border()

    def _check_border(self) -> None:
        if self.border not in (None, borders.NEAREST):
            borders.get(self.border)
        if self.border_granularity not in (None, *borders.GRANULARITIES):
            known = ", ".join(borders.GRANULARITIES)
            raise InputError(
                f"choice: border_granularity is {self.border_granularity!r}; known: {known}"
            )
        if self.act_bits is None and (self.border or self.border_granularity):
            raise InputError(
                f"choice: border {self.border or self.border_granularity!r} with act_bits None has "
                "no activations to round"
            )

    @property
    def kind(self) -> tuple[str | None, str | None]:
        """The border and its granularity."""
        return self.border, self.border_granularity

    def __str__(self) -> str:
        bits = "float" if self.weight_bits is None else f"w{self.weight_bits}a{self.act_bits or 16}"
        return " ".join([bits, *filter(None, self.kind)])


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limit of an allocation: exactly one of the first six fields.

    >>> import aquant_jax as aq
    >>> aq.Budget(bytes=200_000).counted
    'bytes'
    >>> aq.Budget(degradation=0.05, cost="bit_operations").counted
    'bit_operations'

    Attributes:
      bytes: of the saved arrays, `Sizes.packed` of the quantized network.
      average_bits: the average weight has at most that many bits, and so has the average
        activation; a pair ``(weights, activations)`` limits each by its own. Weights are counted
        once each. Activations are the elements, for one sample, of the tensors that layers read,
        each tensor once however many layers read it, and of the activations that rules add. The
        layers that ``first_weight_bits``, ``last_weight_bits`` and ``last_act_bits`` fix are left
        out, and so is the network's input, so that a uniform recipe of 3 bits has average 3.
        A float counts with the bits of its dtype, 32 for float32, though its name is ``a16``.
      bit_operations: multiplications of one sample, each with weight bits times activation bits.
      latency: milliseconds, the sum over the layers.
      coefficients: of borders.
      degradation: predicted output error; the allocation is the cheapest that keeps to it.
      cost: with `degradation`, what the cheapest has least of: one of the other five names; None
        takes "bytes". Of "average_bits" it is the sum of both averages.
    """

    bytes: int | None = None
    average_bits: float | tuple[float, float] | None = None
    bit_operations: float | None = None
    latency: float | None = None
    coefficients: int | None = None
    degradation: float | None = None
    cost: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"budget: {' and '.join(given) or 'nothing'} given; exactly one of "
                f"{', '.join(LIMITS)} must be"
            )
        value = getattr(self, given[0])
        if self.cost not in (None, *COSTS):
            raise InputError(f"budget: cost is {self.cost!r}; known: {', '.join(COSTS)}")
        if self.cost is not None and given != ["degradation"]:
            raise InputError(
                f"budget: cost {self.cost!r} belongs to degradation; {given[0]}={value!r} is given"
            )
        if isinstance(value, list):  # from JSON
            value = tuple(value)
            object.__setattr__(self, given[0], value)
        pair = given[0] == "average_bits" and isinstance(value, tuple) and len(value) == 2
        if not all(map(is_amount, value if pair else (value,))):
            wanted = "a number of 0 or more" + (" or a pair of them" * (given[0] == "average_bits"))
            raise InputError(f"budget: {given[0]} is {value!r}; it must be {wanted}")

    @property
    def name(self) -> str:
        """The field that is set."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def counted(self) -> str:
        """The cost that the budget limits, or asks for the least of."""
        return self.cost or "bytes" if self.name == "degradation" else self.name

    def limits(self, activations: bool) -> dict[str, float]:
        """The limit of each cost that is limited; empty for a budget of degradation.

        Args:
          activations: whether any may be quantized; one average of bits limits weights alone
            otherwise.
        """
        value = getattr(self, self.name)
        if self.name == "degradation":
            return {}
        if self.name != "average_bits":
            return {self.name: float(value)}
        if isinstance(value, tuple):
            return dict(zip(("weight_bits", "act_bits"), map(float, value), strict=True))
        names = ("weight_bits", "act_bits") if activations else ("weight_bits",)
        return dict.fromkeys(names, float(value))


def is_amount(value: Any) -> bool:
    """Whether a value is a finite number of 0 or more."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return number and 0 <= float(value) < math.inf
    except OverflowError:  # of an int beyond all floats
        return False


def check_choices(choices: Any) -> tuple[Choice, ...]:
    """The choices, each once.

    Raises:
      InputError: there are none, or one is no `Choice`.
    """
    check_type("choices", choices, Sequence, "a list of aq.Choice")
    if not choices:
        raise InputError(f"choices are {choices!r}; there must be one or more aq.Choice")
    for choice in choices:
        if not isinstance(choice, Choice):
            raise InputError(f"choices: {choice!r} is no aq.Choice")
    return tuple(dict.fromkeys(choices))
