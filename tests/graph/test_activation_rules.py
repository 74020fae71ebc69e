"""Activations between the layers: where they are, how they are named, that they are quantized."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.graph.activation_rules import RULES, match_rules
from aquant_jax.graph.ir import sample_first
from aquant_jax.graph.subgraph import source_tensor
from aquant_jax.graph.trace import trace
from aquant_jax.models.bert import Bert, BertConfig
from tests.support.nets import images, normal, residual_net, rng_of, run_folded

ALL = ("softmax", "norm", "sum", "activation", "matmul")
# As many channels as scores of a token over all heads: sizes alone tell nothing apart.
CONFIG = BertConfig(
    vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=12, max_position_embeddings=8,
)  # fmt: skip
LENGTH = 4


def tokens(seed=0, samples=16, length=LENGTH):
    rng = rng_of(seed)
    lengths = rng.integers(2, length + 1, samples)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, 30, (samples, length)).astype(np.int32) * mask
    return {"ids": ids, "mask": mask, "types": np.zeros_like(ids)}


@functools.cache
def bert(labels=None, layers=2):
    model = Bert(dataclasses.replace(CONFIG, num_hidden_layers=layers), labels)
    variables = jax.jit(model.init)(jax.random.key(0), tokens(samples=1))
    rng = rng_of(1)
    return model.apply, jax.tree.map(lambda a: a + 0.1 * normal(rng, *a.shape), variables)


def recipe(**fields):
    everywhere = dict.fromkeys(("first_weight_bits", "last_weight_bits", "last_act_bits"))
    given = {"steps": 0, "batch_size": 8, "activations": ALL, **everywhere, **fields}
    return aq.recipes.nearest(4, 4, **given)


def keys(apply, variables, x, rules):
    return [site.key for site in match_rules(trace(apply, variables, x), rules)]


def short(names):
    return [name.removeprefix("params/encoder/").replace("/kernel", "") for name in names]


@functools.cache
def two_bits():
    apply, variables = bert(layers=1)
    chosen = recipe().replace(act_bits=2)
    return aq.quantize(apply, variables, tokens(), chosen, observer=aq.Observer())


@pytest.mark.user_model
class TestBert:
    def test_each_rule_finds_its_own(self):
        apply, variables = bert()
        found = {rule: short(keys(apply, variables, tokens(), (rule,))) for rule in RULES}
        layers = ("layer_0", "layer_1")
        assert found == {
            "matmul": [
                f"{layer}/{name}:matmul{number}"
                for layer in layers
                for name, number in (("query", ""), ("key", ""), ("value", ""), ("key", "#2"))
            ],
            "softmax": [f"{layer}/key:softmax" for layer in layers],
            "sum": [f"{layer}/{name}:sum" for layer in layers for name in ("out", "down")],
            "norm": [
                "input:norm",
                *(f"{layer}/{name}:norm" for layer in layers for name in ("out", "down")),
            ],
            "activation": [f"{layer}/up:activation" for layer in layers],
        }

    def test_the_input_of_a_layer_is_no_site_and_is_named_by_the_layer(self):
        apply, variables = bert()
        net = aq.prepare(apply, variables, tokens(), recipe())
        names = short(tensor.key for tensor in net.plan.tensors.values())
        assert len(names) == len(set(names))
        assert {"layer_0/query", "layer_0/out", "layer_0/up", "layer_0/down"} <= set(names)
        assert "input:norm" not in names
        assert "layer_0/up:activation" not in names
        # The last one is read by no layer.
        assert [name for name in names if name.endswith(":norm")] == ["layer_1/down:norm"]

    def test_they_are_printed(self):
        apply, variables = bert()
        text = aq.describe(aq.prepare(apply, variables, tokens(), recipe()))
        assert "params/encoder/layer_1/key/kernel:softmax: 4 bits" in text
        without = aq.describe(aq.prepare(apply, variables, tokens(), recipe(activations=())))
        assert "softmax" not in without

    def test_they_are_rounded_to_few_values(self):
        x, quantized = tokens(), two_bits()
        state = quantized.activations["params/encoder/layer_0/down/kernel:norm"]
        # One token a sample: the embedding is the last normalised tensor itself.
        alone = {**x, "mask": (np.arange(LENGTH) < 1).astype(np.int32)[None].repeat(16, 0)}
        codes = np.asarray(quantized(alone)) / state.step_size + state.zero_point
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
        assert set(np.unique(np.round(codes))) <= {0, 1, 2, 3}

    def test_any_batch_and_length_run_with_the_same_tensors(self):
        x, quantized = tokens(), two_bits()
        whole = np.asarray(quantized(x))
        part = np.asarray(quantized({name: leaf[:3] for name, leaf in x.items()}))
        np.testing.assert_allclose(part, whole[:3], atol=1e-5)
        longer = {name: np.pad(leaf, ((0, 0), (0, 2))) for name, leaf in x.items()}
        np.testing.assert_allclose(quantized(longer), whole, atol=1e-5)

    def test_blocks_are_layers_or_their_halves(self):
        apply, variables = bert()
        halves = (r"layer_\d+/(query|key|value|out)/", r"layer_\d+/(up|down)/")

        def layers(**fields):
            net = aq.prepare(apply, variables, tokens(), recipe(**fields))
            return [len(block.layers) for block in net.blocks]

        assert layers() == [6, 6]
        assert layers(blocks=halves) == [4, 2, 4, 2]
        assert layers(granularity="layer") == [1] * 12

    def test_a_block_ends_behind_its_normalisation(self):
        apply, variables = bert()
        x = tokens(samples=8)
        net = aq.prepare(apply, variables, x, recipe())
        params = variables["params"]["encoder"]
        program = net.graph._replace(outputs=net.blocks[0].end)
        found = run_folded(net._replace(graph=program._replace(tree=jax.tree.structure(0))), x)
        scaled = (np.asarray(found) - params["layer_0"]["norm"]["bias"]) / params["layer_0"][
            "norm"
        ]["scale"]
        np.testing.assert_allclose(scaled.mean(-1), 0, atol=1e-4)
        np.testing.assert_allclose(scaled.std(-1), 1, atol=1e-3)


def test_masks_and_masked_scores_are_none():
    # Scores as large as the activations, set to minus a billion where they are masked.
    rng = rng_of(0)
    variables = {name: {"kernel": normal(rng, 4, 4)} for name in ("query", "key", "value")}

    def apply(variables, x):
        query, key, value = (x["x"] @ variables[n]["kernel"] for n in ("query", "key", "value"))
        scores = query @ jnp.swapaxes(key, 1, 2)
        masked = jnp.where(x["mask"][:, None] > 0, scores, jnp.float32(-1e9))
        return jax.nn.softmax(masked, axis=-1) @ value

    x = {"x": normal(rng, 2, 4, 4), "mask": np.ones((2, 4), np.float32)}
    assert keys(apply, variables, x, ALL) == [
        "query/kernel:matmul", "key/kernel:matmul", "value/kernel:matmul", "key/kernel:softmax",
    ]  # fmt: skip


def test_sums_of_residual_branches_in_a_cnn():
    apply, variables = residual_net(blocks=2)
    assert keys(apply, variables, images(0, 2), ("sum",)) == [
        "block_1/conv2/kernel:sum", "block_2/conv2/kernel:sum",
    ]  # fmt: skip
    every = keys(apply, variables, images(0, 2), ("activation",))
    assert [key.split("/")[0] for key in every] == ["stem", *["block_1"] * 2, *["block_2"] * 2]


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "leaky relu": jax.nn.leaky_relu,
    "hard swish": jax.nn.hard_swish,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
}


@pytest.mark.user_model
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_function_ends_where_its_last_op_does(name):
    function = ACTIVATIONS[name]
    variables = {"kernel": normal(rng_of(0), 4, 4)}
    x = normal(rng_of(1), 3, 4)
    graph = trace(lambda v, x: function(x @ v["kernel"]).T, variables, x)
    (site,) = match_rules(graph, ("activation",))
    wanted = function(x @ variables["kernel"])
    net = trace(lambda v, x: function(x @ v["kernel"]), variables, x)
    assert graph.avals[site.value].shape == wanted.shape
    assert site.value == source_tensor(net.producers(), net.outputs[0])


NORMS = {
    "layer norm": nn.LayerNorm(),
    "layer norm in two passes": nn.LayerNorm(use_fast_variance=False),
    "rms norm": nn.RMSNorm(),
    "group norm": nn.GroupNorm(num_groups=2),
    "instance norm": nn.InstanceNorm(),
}


@pytest.mark.user_model
@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_ends_behind_its_offset(name):
    norm = NORMS[name]
    x = normal(rng_of(1), 3, 5, 4)
    variables = {"kernel": normal(rng_of(0), 4, 4), "norm": norm.init(jax.random.key(0), x)}

    def apply(variables, x):
        return norm.apply(variables["norm"], x @ variables["kernel"])

    graph = trace(apply, variables, x)
    (site,) = match_rules(graph, ("norm",))
    assert graph.avals[site.value].shape in ((3, 5, 4), (3, 5, 2, 2))
    last = [
        op
        for op in graph.ops
        if op.name in ("add", "mul") and op.outputs[0] in graph.weight_dependent
    ][-1]
    assert site.value in last.outputs


class TestOverrides:
    def net(self, *overrides):
        apply, variables = bert(labels=2)
        return aq.prepare(apply, variables, tokens(), recipe(overrides=overrides))

    @pytest.mark.user_model
    def test_a_pattern_with_a_colon_addresses_activations(self):
        bits = {
            tensor.key: tensor.bits
            for tensor in self.net(aq.Override(":softmax", act_bits=8)).plan.tensors.values()
        }
        eight = {key for key, value in bits.items() if value == 8}
        assert short(sorted(eight)) == ["layer_0/key:softmax", "layer_1/key:softmax"]

    @pytest.mark.user_model
    def test_they_can_stay_float(self):
        plan = self.net(aq.Override("layer_0.*:sum", keep_float=True)).plan
        names = short(tensor.key for tensor in plan.tensors.values())
        assert [n for n in names if n.endswith(":sum")] == ["layer_1/out:sum", "layer_1/down:sum"]

    @pytest.mark.user_model
    def test_a_pattern_without_a_colon_addresses_layers(self):
        plan = self.net(aq.Override("key", act_bits=8)).plan
        bits = {tensor.key: tensor.bits for tensor in plan.tensors.values()}
        assert bits["params/encoder/layer_0/key/kernel:matmul"] == 4
        assert bits["params/encoder/layer_0/query/kernel"] == 8  # the tensor that key reads, too

    @pytest.mark.user_model
    def test_what_matches_nothing_is_an_error_that_lists_them(self):
        with pytest.raises(InputError, match=r"':soft_max' matches none of .*key/kernel:softmax"):
            self.net(aq.Override(":soft_max", act_bits=8))


@pytest.mark.user_model
def test_what_only_a_float_layer_reads_is_no_site():
    rng = rng_of(0)
    variables = {name: rng.normal(size=(4, 4)).astype("f") for name in "abc"}

    def alone(v, x):
        return jax.nn.relu(jax.nn.relu(x @ v["a"]) @ v["b"]) @ v["c"]

    def beside_a_sum(v, x):
        h = jax.nn.relu(x @ v["a"])
        return h @ v["b"] @ v["c"] + h

    floats = ({"pattern": "[bc]", "keep_float": True},)
    chosen = recipe(activations=("activation",), overrides=floats)
    for apply, expected in ((alone, set()), (beside_a_sum, {"a:activation"})):
        net = aq.prepare(apply, variables, rng.normal(size=(16, 4)).astype("f"), chosen)
        assert {tensor.key for tensor in net.plan.tensors.values()} == expected


@pytest.mark.parametrize("take", ["split", "slice"])
def test_an_activation_of_a_part_of_one_layer_is_found(take):
    """Gates and values from one dense layer, as in a fused SwiGLU."""
    x = normal(rng_of(0), 2, 6, 16)
    variables = {"both": normal(rng_of(1), 16, 24), "down": normal(rng_of(2), 12, 16)}

    def apply(v, x):
        both = x @ v["both"]
        parts = jnp.split(both, 2, -1) if take == "split" else (both[..., :12], both[..., 12:])
        return x + (jax.nn.silu(parts[0]) * parts[1]) @ v["down"]

    assert keys(apply, variables, x, ("activation",)) == ["both:activation"]


def test_an_unknown_rule_lists_what_exists():
    with pytest.raises(InputError, match=r"unknown rule 'gelu'; there are matmul, sum, norm"):
        aq.recipes.qdrop(activations=("gelu",))
    with pytest.raises(InputError, match=r"activations is 'sum'; it must be a list or tuple"):
        aq.recipes.qdrop(activations="sum")


def test_samples_are_known_where_the_sites_are():
    apply, variables = residual_net()
    graph, more = (trace(apply, variables, images(0, n)) for n in (2, 3))
    sampled = sample_first(graph, more)
    assert all(site.value in sampled for site in match_rules(graph, ALL))


def linen_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    x = normal(rng_of(0), 2, 6, 16)
    variables = module.init(jax.random.key(0), x)
    return lambda v, x: module.apply(v, x, x), variables, x


def nnx_attention():
    module = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    return lambda v, x: nnx.merge(graphdef, v)(x), state, normal(rng_of(0), 2, 6, 16)


def jax_attention():
    variables = {name: normal(rng_of(1), 16, 16) for name in ("query", "key", "value", "out")}

    def apply(variables, x):
        heads = ((x @ variables[n]).reshape(2, 6, 2, 8) for n in ("query", "key", "value"))
        return jax.nn.dot_product_attention(*heads).reshape(x.shape) @ variables["out"]

    return apply, variables, normal(rng_of(0), 2, 6, 16)


@pytest.mark.user_model
@pytest.mark.parametrize("build", [linen_attention, nnx_attention, jax_attention])
def test_attention_that_others_wrote(build):
    found = {key.replace("/kernel", "").split("/")[-1] for key in keys(*build(), ALL)}
    assert found == {"query:matmul", "key:matmul", "value:matmul", "key:softmax"}
