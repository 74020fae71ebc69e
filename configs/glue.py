"""The common part of the configs of transformers."""

from typing import Any

from ml_collections import ConfigDict

from configs import variants

# All intermediate activations, as in Bondarenko et al. (2021); the first rule that finds a tensor
# names it.
ACTIVATIONS = ("softmax", "norm", "sum", "activation", "matmul")
BLOCKS = {
    "preset": (),  # the preset's own
    "layers": (),  # of the encoder, whole
    "sub-blocks": (r"layer_\d+/(query|key|value|out)/", r"layer_\d+/(up|down)/"),
}
CHOICES = {
    "preset": variants.BERT_PRESETS,
    "blocks": tuple(BLOCKS),
    "sums": ("same", "8"),
    "transforms": tuple(variants.TRANSFORMS),
}


def config(
    variant: variants.Variant,
    task: str,
    weights: str,
    overrides: tuple[dict[str, Any], ...] = (),
    **fields: Any,
) -> ConfigDict:
    """The config of an encoder on a task.

    Args:
        variant: bit-width and `CHOICES`: the preset; ``blocks``, the encoder's layers or their
            halves, where they are to be reconstructed together; ``sums``, the bits of the residual
            sums where they are not those of the rest; ``transforms``, the channel transforms.
        task: of GLUE.
        weights: folder of the checkpoint, in data_dir.
        overrides: of the recipe.
        **fields: of the recipe.
    """
    chosen = ConfigDict()
    chosen.model = "bert"
    chosen.weights = weights
    chosen.dataset = f"glue/{task}"
    chosen.mask = "mask"  # which tokens are no padding
    chosen.apart = False
    chosen.calibration_dataset = ""  # the same
    chosen.calibration_size = 1024
    chosen.test_limit = None
    chosen.eval_batch_size = 64
    chosen.preset = variant.settings["preset"]
    everywhere = dict.fromkeys(("first_weight_bits", "last_weight_bits", "last_act_bits"))
    if variant.settings["sums"] != "same":
        overrides += ({"pattern": ":sum", "act_bits": int(variant.settings["sums"])},)
    blocks = variant.settings["blocks"]
    if blocks != "preset":
        fields["granularity"] = "block"
    chosen.recipe = variants.recipe(
        variant,
        activations=ACTIVATIONS,
        transforms=variants.TRANSFORMS[variant.settings["transforms"]],
        blocks=BLOCKS[blocks],
        overrides=overrides,
        **everywhere,
        **fields,
    )
    return chosen
