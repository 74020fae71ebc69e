"""The paper's tables: what is in them, and its values. 1 and 3: top-1 % on ImageNet; 2: GLUE."""

from typing import NamedTuple

from configs import variants

MODELS: tuple[str, ...] = (
    "resnet18", "resnet50", "mobilenetv2", "regnetx_600mf", "regnetx_3200mf", "mnasnet2",
)  # fmt: skip
FLOAT: dict[str, float] = dict(zip(MODELS, (71.01, 76.62, 72.63, 73.53, 78.45, 76.52), strict=True))

TASKS: tuple[str, ...] = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_GLUE_FLOAT = (58.59, 91.28, 89.54, 89.14, 87.98, 84.06, 91.19, 70.39)
FLOAT |= dict(zip(TASKS, _GLUE_FLOAT, strict=True))
_TABLE_2 = {
    ("w4a4", "adaround"): (43.82, 82.45, 87.92, 83.13, 74.24, 65.77, 83.29, 55.60),
    ("w4a4", "aquant_bert"): (45.23, 84.06, 88.62, 83.87, 75.87, 68.57, 83.45, 61.37),
}

_TABLE_1 = {
    ("w4a4", "adaround"): (69.49, 74.82, 67.53, 70.87, 76.41, 71.80),
    ("w4a4", "brecq"): (69.45, 75.05, 68.29, 70.96, 76.64, 73.24),
    ("w4a4", "qdrop"): (69.61, 75.40, 68.57, 71.19, 76.76, 73.54),
    ("w4a4", "aquant"): (70.03, 75.58, 69.15, 71.68, 77.03, 73.78),
    ("w2a4", "adaround"): (63.64, 66.61, 44.90, 58.95, 64.66, 51.03),
    ("w2a4", "brecq"): (64.84, 70.27, 53.43, 62.41, 71.21, 62.11),
    ("w2a4", "qdrop"): (65.16, 70.71, 54.22, 63.59, 71.34, 63.78),
    ("w2a4", "aquant"): (66.63, 71.11, 56.74, 65.71, 72.98, 65.27),
    ("w3a3", "adaround"): (66.00, 69.72, 48.92, 61.99, 68.65, 50.48),
    ("w3a3", "brecq"): (66.01, 71.73, 54.66, 63.79, 71.75, 64.16),
    ("w3a3", "qdrop"): (66.65, 72.38, 57.68, 65.37, 72.69, 66.43),
    ("w3a3", "aquant"): (67.97, 73.20, 58.56, 67.11, 74.09, 68.96),
    ("w2a2", "brecq"): (51.12, 51.36, 7.44, 29.84, 41.88, 13.32),
    ("w2a2", "qdrop"): (54.19, 57.38, 11.45, 41.53, 54.61, 28.65),
    ("w2a2", "aquant"): (60.31, 60.04, 14.19, 46.61, 57.48, 30.31),
}
TABLE_1: dict[tuple[str, str, str], float] = {
    (model, *key): value
    for key, values in _TABLE_1.items()
    for model, value in zip(MODELS, values, strict=True)
}
TABLE_2: dict[tuple[str, str, str], float] = {
    (task, *key): value
    for key, values in _TABLE_2.items()
    for task, value in zip(TASKS, values, strict=True)
}
TABLE_3: dict[tuple[str, str, str], float] = {
    (model, bits, row): value
    for bits, row, values in (
        ("w2a2", "linear", (59.14, 45.37)),
        ("w2a2", "aquant", (60.31, 46.61)),
        ("w2a2", "not fused", (58.56, 44.95)),
        ("w3a3", "linear", (67.59, 66.78)),
        ("w3a3", "aquant", (67.97, 67.11)),
        ("w3a3", "not fused", (67.76, 66.93)),
    )
    for model, value in zip(("resnet18", "regnetx_600mf"), values, strict=True)
}

ABLATION = {
    "aquant": {"recipe.border": "quadratic", "recipe.border_granularity": "mean"},
    "linear": {"recipe.border": "linear", "recipe.border_granularity": "mean"},
    "not fused": {"recipe.border": "quadratic", "recipe.border_granularity": "element"},
    "linear, not fused": {"recipe.border": "linear", "recipe.border_granularity": "element"},
}


def cell_name(bits: str, row: str) -> str:
    """The name of the folders of a cell, before the seed.

    >>> cell_name("w2a2", "linear, not fused")
    'w2a2-linear-not-fused'
    """
    return f"{bits}-{row.replace(', ', '-').replace(' ', '-')}"


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
        models: its columns: networks, or tasks of one network.
        bits: its bit-widths.
        rows: by name: preset and overrides of the config.
        paper: the paper's values by (model, bits, row).
        config: file and start of the variant of a column.
    """

    models: tuple[str, ...]
    bits: tuple[str, ...]
    rows: dict[str, tuple[str, dict[str, str]]]
    paper: dict[tuple[str, str, str], float]
    config: str = "{model}.py"


TABLES = {
    "1": Table(
        MODELS,
        ("w4a4", "w2a4", "w3a3", "w2a2"),
        {name: (name, {}) for name in variants.PRESETS[1:] + variants.PRESETS[:1]},
        TABLE_1,
    ),
    "2": Table(
        TASKS,
        ("w4a4",),
        {name: (name, {}) for name in ("adaround", "aquant_bert")},
        TABLE_2,
        "glue_bert.py:{model}",
    ),
    "3": Table(
        ("resnet18", "regnetx_600mf"),
        ("w2a2", "w3a3"),
        {name: ("aquant", overrides) for name, overrides in ABLATION.items()},
        TABLE_3,
    ),
}
