import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.plan.block_program import make_block_program
from tests.support.nets import conv, images, mlp, normal, relative_error, residual_net, rng_of

X = images(0, 8)


def prepare(apply, variables, x=X, **fields):
    return aq.prepare(apply, variables, x, aq.recipes.nearest(batch_size=8, **fields))


def layers(net):
    return [block.layers for block in net.blocks]


def unit_layers(net):
    """The layers that the unit of every block really runs."""
    units = [make_block_program(net.graph, net.plan, b.start, b.targets) for b in net.blocks]
    return [tuple(spec.path for spec in granularity.specs) for granularity in units]


def test_residual_network_splits_into_stem_blocks_and_head():
    net = prepare(*residual_net(blocks=3))
    assert [b.name for b in net.blocks] == ["stem", "block_1", "block_2", "block_3", "head"]
    assert layers(net)[1] == ("block_1/conv1/kernel", "block_1/conv2/kernel")
    assert layers(net) == unit_layers(net)


def test_description_shows_every_block_and_the_memory():
    text = aq.describe(prepare(*residual_net()))
    assert text.splitlines() == [
        "3 blocks:",
        "  0  stem: stem/kernel",
        "  1  block_1: block_1/conv1/kernel, block_1/conv2/kernel",
        "  2  head: head/kernel",
        text.splitlines()[-2],
        "4 of 4 weighted ops quantized",
    ]
    assert "cached activations" in text


def test_blocks_hand_on_what_the_next_one_takes():
    net = prepare(*residual_net(blocks=2))
    assert net.blocks[0].start == ()
    for one, two in zip(net.blocks, net.blocks[1:], strict=False):
        assert one.end == two.start
        assert len(one.end) == 1
    assert net.blocks[-1].end == net.graph.outputs


def test_cut_comes_after_the_activation_and_before_pooling():
    net = prepare(*residual_net())
    producers = net.graph.producers()
    for block in net.blocks[:-1]:
        (value,) = block.end
        assert producers[value].name in ("custom_jvp_call", "max", "jit")
    assert producers[net.blocks[1].end[0]].name != "reduce_sum"


def test_layer_units_are_single_layers():
    net = prepare(*residual_net(), granularity="layer")
    assert all(len(block.layers) == 1 for block in net.blocks)
    assert len(net.blocks) == 4
    assert layers(net) == unit_layers(net)
    # The skip stays alive beside the first conv's output, but only the latter is a target.
    assert len(net.blocks[1].end) == 2
    assert len(net.blocks[1].targets) == 1


def test_repeated_modules_are_merged_by_path():
    """A chain without residuals cuts everywhere; its layers are merged by module."""
    rng = rng_of(0)
    variables = {
        f"stage_{i}": {n: {"kernel": normal(rng, 3, 3, 3, 3)} for n in ("a", "b")} for i in (1, 2)
    }

    def apply(v, x):
        for i in (1, 2):
            for name in ("a", "b"):
                x = jax.nn.relu(conv(x, v[f"stage_{i}"][name]["kernel"]))
        return x

    net = prepare(apply, variables)
    assert [b.name for b in net.blocks] == ["stage_1", "stage_2"]
    assert layers(net) == unit_layers(net)


def test_plain_chain_is_one_layer_a_block():
    net = prepare(*mlp(), normal(rng_of(0), 8, 6))
    assert layers(net) == [("0/w",), ("1/w",), ("2/w",)]


def test_padding_with_a_value_of_its_own_makes_a_new_tensor():
    def apply(v, x):
        h = jax.nn.relu(conv(x, v["a"]))
        h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=50.0)
        return conv(h, v["b"], padding="VALID")

    variables = {"a": normal(rng_of(0), 3, 3, 3, 4), "b": normal(rng_of(1), 3, 3, 4, 4)}
    recipe = aq.recipes.nearest(8, 8, batch_size=8)
    quantized = aq.quantize(apply, variables, X, recipe, observer=aq.Observer())
    assert relative_error(quantized(X), apply(variables, X)) < 0.02


def test_layer_units_take_no_regex_that_matches_nothing_either():
    with pytest.raises(aq.InputError, match="nonsense"):
        aq.prepare(*residual_net(), X, aq.recipes.adaround(batch_size=8, blocks=("nonsense",)))


def test_branches_are_one_block():
    def apply(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        branches = [jax.nn.relu(conv(h, v["left"])), jax.nn.relu(conv(h, v["right"]))]
        return jnp.mean(jnp.concatenate(branches, -1), (1, 2)) @ v["head"]

    variables = {
        "stem": normal(rng_of(0), 3, 3, 3, 4), "left": normal(rng_of(1), 3, 3, 4, 2),
        "right": normal(rng_of(2), 1, 1, 4, 2), "head": normal(rng_of(3), 4, 5),
    }  # fmt: skip
    net = prepare(apply, variables)
    assert layers(net) == [("stem",), ("left", "right"), ("head",)]
    assert layers(net) == unit_layers(net)


def test_a_network_that_never_cuts_is_one_block():
    def apply(v, x):
        h = [conv(x, v["a"])]
        for name in ("b", "c"):
            h.append(conv(jax.nn.relu(sum(h)), v[name]))
        return sum(h)

    variables = {
        "a": normal(rng_of(0), 3, 3, 3, 3), "b": normal(rng_of(1), 3, 3, 3, 3),
        "c": normal(rng_of(2), 3, 3, 3, 3),
    }  # fmt: skip
    # relu(h0) with h0 alive beside it: after layer a alone one value is live, after b two.
    assert layers(prepare(apply, variables)) == [("a",), ("b", "c")]


def test_masks_do_not_count_as_weight_dependent():
    """Only what depends on a weight does."""

    def apply(v, x):
        mask = jnp.mean(x, axis=-1, keepdims=True) > 0
        h = jax.nn.relu(conv(x, v["a"]))
        return jnp.where(mask, conv(h, v["b"]), 0.0)

    variables = {"a": normal(rng_of(0), 3, 3, 3, 4), "b": normal(rng_of(1), 3, 3, 4, 4)}
    net = prepare(apply, variables)
    assert layers(net) == [("a",), ("b",)]
    program = make_block_program(net.graph, net.plan, net.blocks[1].start, net.blocks[1].targets)
    assert program.subgraph.model_inputs == net.graph.inputs


class TestOverride:
    def test_a_regex_merges_consecutive_blocks(self):
        net = prepare(*residual_net(blocks=3), blocks=("block_[12]",))
        assert [len(b) for b in layers(net)] == [1, 2, 2, 2, 1]
        net = prepare(*residual_net(blocks=3), blocks=("block_",))
        assert [len(b) for b in layers(net)] == [1, 6, 1]
        assert layers(net) == unit_layers(net)

    def test_a_regex_merges_up_to_the_head(self):
        net = prepare(*residual_net(blocks=2), blocks=(r"^(?:block_2|head)", "stem|block_1"))
        assert [len(b) for b in layers(net)] == [1, 2, 2, 1]
        net = prepare(*residual_net(blocks=2), blocks=(r"^(?=block_2|head)",))
        assert [len(b) for b in layers(net)] == [1, 2, 3]

    def test_a_regex_that_matches_nothing_is_an_error(self):
        with pytest.raises(InputError, match=r"blocks: 'layer9' matches none of .*stem/kernel"):
            prepare(*residual_net(), blocks=("block_1", "layer9"))

    def test_a_bad_regex_is_an_error(self):
        with pytest.raises(InputError, match=r"blocks: 'block_\(' is not a regular expression"):
            prepare(*residual_net(), blocks=("block_(",))


EARLY = {
    "stem": normal(rng_of(0), 3, 3, 3, 4), "a": normal(rng_of(1), 3, 3, 4, 4),
    "b": normal(rng_of(2), 3, 3, 4, 4), "aux": normal(rng_of(3), 4, 2),
    "head": normal(rng_of(4), 4, 5),
}  # fmt: skip


class TestSeveralOutputs:
    """An output that is finished early belongs to the block that makes it."""

    @staticmethod
    def features(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        y = jax.nn.relu(conv(h, v["a"]) + h)
        z = jax.nn.relu(conv(y, v["b"]) + y)
        return {"features": jnp.mean(y, (1, 2)), "logits": jnp.mean(z, (1, 2)) @ v["head"]}

    @staticmethod
    def auxiliary(v, x):
        h = jax.nn.relu(conv(x, v["stem"]))
        aux = jnp.mean(h, (1, 2)) @ v["aux"]
        y = jax.nn.relu(conv(h, v["a"]) + h)
        return aux, jnp.mean(y, (1, 2)) @ v["head"]

    @pytest.mark.parametrize("granularity", ["block", "layer"])
    @pytest.mark.parametrize("name", ["features", "auxiliary"])
    def test_every_layer_is_in_one_block(self, name, granularity):
        net = prepare(getattr(self, name), EARLY, granularity=granularity)
        assert unit_layers(net) == layers(net)
        every = [path for block in layers(net) for path in block]
        assert sorted(every) == sorted(layer.path for layer in net.graph.layers)

    @pytest.mark.parametrize("granularity", ["block", "layer"])
    @pytest.mark.parametrize("name", ["features", "auxiliary"])
    def test_it_is_quantized(self, name, granularity):
        apply = getattr(self, name)
        recipe = aq.recipes.nearest(8, 8, batch_size=8, granularity=granularity)
        quantized = aq.quantize(apply, EARLY, X, recipe, observer=aq.Observer())
        for found, expected in zip(
            jax.tree.leaves(quantized(X)), jax.tree.leaves(apply(EARLY, X)), strict=True
        ):
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_outputs_that_no_weight_touches_are_handed_through():
    def apply(v, x):
        return conv(x, v["w"]), x, 3.0, v["w"], jnp.sum(x, axis=(1, 2, 3))

    variables = {"w": normal(rng_of(0), 3, 3, 3, 4)}
    recipe = aq.recipes.nearest(8, 8, batch_size=8)
    found = aq.quantize(apply, variables, X, recipe, observer=aq.Observer())(X)
    np.testing.assert_array_equal(found[1], X)
    assert found[2] == 3.0
    np.testing.assert_array_equal(found[3], variables["w"])
    np.testing.assert_allclose(found[4], X.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_pooling_belongs_to_the_block_that_follows(stride):
    """Even where it keeps the shape: what is quantized is the tensor before it."""

    def apply(v, x):
        h = jax.nn.relu(conv(x, v["a"]))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, stride, stride, 1), "SAME")
        return conv(h, v["b"])

    variables = {"a": normal(rng_of(0), 3, 3, 3, 4), "b": normal(rng_of(1), 3, 3, 4, 4)}
    net = prepare(apply, variables)
    (value,) = net.blocks[0].end
    assert net.graph.avals[value].shape == (8, 6, 6, 4)
    assert net.graph.producers()[value].name != "reduce_window_max"


def test_a_layer_is_reconstructed_with_the_sum_and_the_normalisation_behind_it():
    def norm(h):
        centred = h - jnp.mean(h, -1, keepdims=True)
        return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1)

    def apply(v, x):
        h = norm(x @ v["a"])
        y = jnp.tanh(h @ v["b"])
        return norm(y @ v["c"] + h) @ v["head"]

    rng = rng_of(0)
    variables = {name: normal(rng, 3, 3) for name in ("a", "b", "c", "head")}
    net = prepare(apply, variables, normal(rng, 8, 5, 3), granularity="layer")
    assert layers(net) == unit_layers(net) == [("a",), ("b",), ("c",), ("head",)]
    inside = []
    for block in net.blocks:
        assert block.targets
        ops = make_block_program(net.graph, net.plan, block.start, block.targets).subgraph.ops
        inside.append({op.name for op in ops} & {"rsqrt", "tanh", "add"})
    assert inside == [{"rsqrt", "add"}, {"tanh"}, {"rsqrt", "add"}, set()]
