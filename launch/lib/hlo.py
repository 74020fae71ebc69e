"""What a compiled program sends from device to device, read from its HLO text."""

import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/")  # numbers every fifth element of a tuple
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """The collectives of one kind in a program.

    Attributes:
        count: how many there are.
        bytes: of their operands, on one device.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program by kind; those in the body of a loop count once.

    Args:
        text: of `jax.stages.Compiled.as_text`, the program of one device.
    """
    text = _COMMENT.sub("", text)
    defined = list(_DEFINED.finditer(text))
    sizes = {found[1]: array_bytes(found[2]) for found in defined}
    totals: dict[str, Collective] = {}
    for found in defined:
        kind = found[3].removesuffix("-start")
        if kind in KINDS:
            operands = text[found.end() : text.index(")", found.end())]
            names = (operand.split()[-1].lstrip("%") for operand in operands.split(", "))
            before = totals.get(kind, Collective(0, 0))
            size = before.bytes + sum(sizes[name] for name in names)
            totals[kind] = Collective(before.count + 1, size)
    return totals


def array_bytes(shape: str) -> int:
    """Bytes of a type in HLO.

    >>> array_bytes("(f16[2,3]{1,0}, pred[4]{0}, s32[])")
    20
    """
    total = 0
    for _, bits, sizes in _ARRAY.findall(shape):
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size)
        total += elements * max(int(bits or 8) // 8, 1)
    return total
