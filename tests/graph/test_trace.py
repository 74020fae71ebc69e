import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.graph.subgraph import (
    BlockInputs,
    bind_inputs,
    constant_inputs,
    extract_subgraph,
    run,
)
from aquant_jax.graph.trace import trace
from tests.support.nets import conv, images, mlp, normal, relative_error, residual_net, rng_of

X = images(0, samples=2)


def kernels(**shapes):
    return {name: 0.3 * normal(rng_of(i), *s) for i, (name, s) in enumerate(shapes.items())}


def paths(apply, variables, x=X):
    return [layer.path for layer in trace(apply, variables, x).layers]


def replay(apply, variables, x):
    """The outputs of the flat graph, its weighted ops run as they were traced."""
    graph = trace(apply, variables, x)
    program = extract_subgraph(graph, (), graph.outputs)
    weights = [op.layer.weight for op in program.weighted]
    known = extract_subgraph(graph, (), tuple(weights))
    given = BlockInputs(constants=constant_inputs(graph, known, variables))
    values = run(known, given, lambda op, x: x)  # it has no weighted op
    by_weight = dict(zip(weights, values, strict=True))

    def weighted(op, value):
        operands = [value, by_weight[op.layer.weight]]
        return op.call(*(operands if op.layer.x_position == 0 else operands[::-1]))[0]

    by_id = dict(zip(graph.inputs, jax.tree.leaves(x), strict=True))
    inputs = bind_inputs(graph, program, variables, by_id)
    return jax.tree.unflatten(graph.tree, run(program, inputs, weighted))


def test_layers_are_named_by_weight_path_in_order():
    apply, variables = residual_net(blocks=2)
    blocks = [f"block_{i}/conv{j}/kernel" for i in (1, 2) for j in (1, 2)]
    assert paths(apply, variables) == ["stem/kernel", *blocks, "head/kernel"]


def test_the_flat_graph_computes_the_network():
    apply, variables = residual_net()
    assert relative_error(replay(apply, variables, X), apply(variables, X)) < 1e-6


def test_a_reused_weight_is_numbered():
    variables = kernels(a=(3, 3, 3, 3))
    assert paths(lambda v, x: conv(conv(x, v["a"]), v["a"]), variables) == ["a", "a#2"]
    variables["a#2"] = variables["a"]
    third = lambda v, x: conv(conv(conv(x, v["a"]), v["a"]), v["a#2"])  # noqa: E731
    assert paths(third, variables) == ["a", "a#2", "a#2#2"]


def test_a_weight_behind_casts_and_transposes_keeps_its_path():
    variables = kernels(small=(3,), a=(4, 3, 3, 3))

    def apply(v, x):
        kernel = jnp.transpose(v["a"], (2, 3, 1, 0)).astype(jnp.bfloat16)
        gain = v["small"][None, None, :, None].astype(jnp.bfloat16)
        return conv(x.astype(jnp.bfloat16), kernel * gain)

    (layer,) = trace(apply, variables, X).layers
    assert layer.path == "a"
    assert layer.weight_shape == (3, 3, 3, 4)


@jax.custom_jvp
def gated(x, kernel):
    return conv(x, kernel)


@gated.defjvp
def _gated_jvp(primals, tangents):
    return jax.jvp(lambda x, k: 2.0 * conv(x, k), primals, tangents)


@jax.custom_vjp
def reversed_(x, kernel):
    return conv(x, kernel)


reversed_.defvjp(lambda x, k: (conv(x, k), (x, k)), lambda saved, dy: (dy, saved[1]))

WRAPPERS = {
    "jit": lambda x, k: jax.jit(conv)(x, k),
    "jit in jit": lambda x, k: jax.jit(lambda x, k: jax.jit(conv)(x, k))(x, k),
    "remat": jax.checkpoint(conv),
    "custom_jvp": gated,
    "custom_vjp": reversed_,
    "closed_call": lambda x, k: jax.remat(jax.jit(conv))(x, k),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_weighted_ops_inside_calls_are_found(wrap):
    variables = kernels(a=(3, 3, 3, 4), b=(3, 3, 4, 4))

    def apply(v, x):
        return conv(jax.nn.relu(wrap(x, v["a"])), v["b"])

    assert paths(apply, variables) == ["a", "b"]
    assert relative_error(replay(apply, variables, X), apply(variables, X)) < 1e-6


def test_custom_gradients_without_weights_stay_as_they_are():
    """relu'(0) is zero; inlining its custom rule would make it one half."""
    apply = lambda v, x: jax.nn.relu(x @ v["w"])  # noqa: E731
    graph = trace(apply, {"w": np.eye(2, dtype=np.float32)}, np.zeros((1, 2), np.float32))
    names = [op.name for op in graph.ops]
    (call,) = [op.call for op in graph.ops if op.name == "custom_jvp_call"]
    assert "dot_general" in names
    np.testing.assert_array_equal(jax.grad(lambda x: call(x)[0].sum())(jnp.zeros((1, 2))), 0)


def test_a_weight_on_either_side_of_a_dot():
    variables = kernels(right=(3, 5), left=(5, 4))
    x = normal(rng_of(0), 2, 3)

    def apply(v, x):
        return jnp.einsum("io,ni->on", v["left"], x @ v["right"])

    right, left = trace(apply, variables, x).layers
    assert (right.x_position, right.channel_axes) == (0, (1,))
    assert left.channel_axes == (1,)
    assert relative_error(replay(apply, variables, x), apply(variables, x)) < 1e-6


def test_a_product_of_two_activations_is_no_layer():
    variables = kernels(w=(3, 3))

    def apply(v, x):
        y = x @ v["w"]
        return y @ y.T

    assert paths(apply, variables, normal(rng_of(0), 2, 3)) == ["w"]


def test_pytree_inputs_and_outputs():
    variables = kernels(a=(3, 4), b=(2, 4))
    x = {"left": normal(rng_of(0), 5, 3), "right": (normal(rng_of(1), 5, 2),)}

    def apply(v, x):
        return {"sum": x["left"] @ v["a"] + x["right"][0] @ v["b"], "input": x["left"], "one": 1.0}

    assert set(paths(apply, variables, x)) == {"a", "b"}
    found, expected = replay(apply, variables, x), apply(variables, x)
    assert found.keys() == expected.keys()
    assert relative_error(found["sum"], expected["sum"]) < 1e-6
    assert found["one"] == 1.0


def test_constants_that_the_function_closes_over():
    mean, variables = normal(rng_of(0), 1, 3), kernels(w=(3, 4))
    apply = lambda v, x: jax.jit(lambda x: x - mean)(x) @ v["w"]  # noqa: E731
    x = normal(rng_of(1), 2, 3)
    assert relative_error(replay(apply, variables, x), apply(variables, x)) < 1e-6


def loop(v, x):
    return lax.scan(lambda h, k: (conv(h, k), None), x, v["a"])[0]


def until(v, x):
    step = lambda c: (c[0] + 1, conv(c[1], v["a"][0]))  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]


def branch(v, x):
    return lax.cond(x.sum() > 0, lambda x: conv(x, v["a"][0]), lambda x: x, x)


def nested(v, x):
    return jax.jit(loop)(v, x)


def reversed_loop(v, x):
    return lax.scan(lambda h, k: (conv(h, k), None), x, v["a"], reverse=True)[0]


def shared(v, x):
    return lax.fori_loop(0, 3, lambda _, h: conv(h, v["a"][0]), x)


@pytest.mark.parametrize(
    ("apply", "found"),
    [
        (loop, ["a[0]", "a[1]"]),
        (nested, ["a[0]", "a[1]"]),
        (reversed_loop, ["a[1]", "a[0]"]),
        (shared, ["a"]),
        (branch, ["a"]),
    ],
)
def test_weighted_ops_in_loops_and_branches_are_layers(apply, found):
    variables = kernels(a=(2, 3, 3, 3, 3))
    assert paths(apply, variables) == found
    for x in (X, -X):  # another branch
        assert relative_error(replay(apply, variables, x), apply(variables, x)) < 1e-6


def test_an_unknown_number_of_steps_leaves_a_loop_float():
    variables = kernels(a=(2, 3, 3, 3, 3))
    with pytest.raises(InputError, match=r"can be quantized: a \(while\): the number of its steps"):
        trace(until, variables, X)
    graph = trace(lambda v, x: conv(until(v, x), v["a"][1]), variables, X)
    assert [layer.path for layer in graph.layers] == ["a#2"]
    assert [op[:2] for op in graph.unquantized] == [("a", "while")]


def test_ops_that_no_layer_stands_for_are_named():
    variables = kernels(mixed=(3, 2, 10), rows=(2, 4), head=(5, 2), decay=(4, 4))
    dense = kernels(sparse=(4, 4))["sparse"]
    variables["coo"] = sparse.BCOO.fromdense(dense)
    variables["csr"] = sparse.BCSR.fromdense(dense)

    def apply(v, x):
        x = (v["csr"] @ (x @ v["coo"]).T).T
        state = lax.scan(lambda h, t: (h * v["decay"], h @ t), x[:4], x)[1]  # no weighted op
        chosen = jnp.argmax(x[:, :3], axis=1)
        mixed = v["mixed"][chosen].reshape(-1, 4, 5)
        rows = lax.ragged_dot(v["rows"], jnp.stack([x[:4], x[2:]]), jnp.array([1, 1]))
        return (jnp.einsum("bi,bio->bo", x + state, mixed) + rows.sum()) @ v["head"]

    graph = trace(apply, variables, normal(rng_of(1), 6, 4))
    assert [layer.path for layer in graph.layers] == ["head"]
    found = {op.path: op.reason for op in graph.unquantized}
    assert found == {
        "mixed": "the input selects its weights",
        "rows": "the weight is its left operand",
        "coo/0": "its weight is sparse",
        "csr/0": "its weight is sparse",
    }


def test_of_two_selections_the_larger_stack_is_the_weight():
    def apply(v, x):
        chosen = jnp.argmax(x[:, :3], axis=1)
        return jnp.einsum("bi,bio->bo", v["table"][chosen], v["experts"][chosen])

    variables = kernels(experts=(3, 4, 5), table=(3, 4))
    graph = trace(apply, variables, normal(rng_of(1), 6, 4))
    assert [(layer.path, layer.kind) for layer in graph.layers] == [("experts", "experts")]
    assert not graph.unquantized


def test_a_loop_without_weights_is_no_obstacle():
    def apply(v, x):
        h = lax.fori_loop(0, 3, lambda _, h: 0.5 * h, conv(x, v["a"]))
        return conv(h, v["a"])

    assert paths(apply, kernels(a=(3, 3, 3, 3))) == ["a", "a#2"]


TRANSPOSED = {
    "flax": ({}, (3, 3, 3, 4)),
    "transposed kernel": ({"transpose_kernel": True}, (3, 3, 4, 3)),
    "haiku": ({"dimension_numbers": ("NHWC", "HWOI", "NHWC")}, (3, 3, 4, 3)),
    "dilated": ({"rhs_dilation": (2, 1), "padding": ((1, 0), (-1, 2))}, (3, 2, 3, 4)),
}


@pytest.mark.parametrize(("options", "shape"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolution_is_a_layer(options, shape):
    given = {"strides": (2, 3), "padding": "SAME", **options}
    apply = lambda v, x: lax.conv_transpose(x, v["up"], **given)  # noqa: E731
    variables = kernels(up=shape)
    (layer,) = trace(apply, variables, X).layers
    sizes = [layer.weight_shape[axis] for axis in layer.channel_axes]
    assert (layer.path, layer.kind, sizes) == ("up", "conv", [4])
    assert relative_error(replay(apply, variables, X), apply(variables, X)) < 1e-6


def in_batch_groups(v, x):
    return lax.conv_general_dilated(
        x, v["odd"], (1, 1), "SAME", batch_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def weight_first(v, x):
    return conv(v["odd"], x)


def of_integers(v, x):
    return conv(x.astype(jnp.int8), (9 * v["odd"]).astype(jnp.int8)).astype(jnp.float32)


def of_a_byte_image(v, x):
    numbers = ((3,), (0,)), ((), ())
    return lax.dot_general(x.astype(jnp.int8), v["odd"][0, 0], numbers, None, jnp.float32)


def of_selected_integers(v, x):
    x = x.astype(jnp.int32)
    chosen = (9 * v["odd"]).astype(jnp.int32)[x[:, 0, 0, 0]]
    return jnp.einsum("nabi,nio->nabo", x, chosen).astype(jnp.float32)


def of_branches_for_every_sample(v, x):
    def of_one(x):
        return lax.cond(x[0, 0, 0] > 0, lambda: x @ v["odd"], lambda: x)

    return jax.vmap(of_one)(x)


def of_a_loop_in_a_loop(v, x):
    def step(x, _):
        return lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ v["odd"], x), None

    return lax.scan(step, x, None, length=2)[0]


ODD = [
    (
        of_branches_for_every_sample, (3, 3), X,
        "the input selects it for every sample, as jax.vmap of a cond does",
    ),
    (
        of_a_loop_in_a_loop, (3, 3), X,
        "it holds a while: the number of its steps is not known",
    ),
    (of_integers, (3, 3, 3, 4), X, "it multiplies int8 values"),
    (of_a_byte_image, (3, 3, 3, 4), X, "it multiplies int8 and float32 values"),
    (of_selected_integers, (5, 3, 4), X, "the input selects its weights"),
    (in_batch_groups, (3, 3, 3, 4), X, "batch_group_count is 2, supported is 1"),
    (
        weight_first, (1, 8, 8, 6), normal(rng_of(0), 3, 3, 6, 3),
        "the weight is the left operand of a convolution",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "shape", "x", "reason"), ODD)
def test_a_product_that_is_no_layer_is_recorded(function, shape, x, reason):
    variables = kernels(odd=shape, head=(2, 3))

    def apply(v, x):
        y = function(v, x)
        return y.reshape(-1, 2) @ v["head"]

    graph = trace(apply, variables, x)
    assert [layer.path for layer in graph.layers] == ["head"]
    ((path, _, found),) = graph.unquantized
    assert (path, found) == ("odd", reason)
    assert relative_error(replay(apply, variables, x), apply(variables, x)) < 1e-6


def test_a_model_of_such_convolutions_alone_is_an_error_with_all_reasons():
    def apply(v, x):
        return in_batch_groups(v, in_batch_groups(v, x)[..., :3].repeat(2, axis=0))

    message = (
        r"can be quantized: odd \(conv_general_dilated\): batch_group.*; odd#2 \(conv_g.* is 1"
    )
    with pytest.raises(InputError, match=message):
        trace(apply, kernels(odd=(3, 3, 3, 4)), X)


def test_no_weighted_op_is_an_error():
    with pytest.raises(InputError, match="no weighted op"):
        trace(lambda v, x: x * v["a"], kernels(a=(1, 1)), np.ones((2, 1), np.float32))


def test_weights_that_the_function_closes_over_beside_others_are_layers():
    apply, variables = mlp()
    inner, x = normal(rng_of(1), 6, 6), normal(rng_of(0), 2, 6)
    both = lambda v, x: apply(v, x @ inner)  # noqa: E731
    first, *others = paths(both, variables, x)
    assert first == "closed_over/0"
    assert others == paths(apply, variables, x)
    assert relative_error(replay(both, variables, x), both(variables, x)) < 1e-6


def test_weights_that_the_function_closes_over_alone_are_an_error():
    apply, variables = mlp()
    closed = lambda v, x: apply(variables, x) * v["scale"]  # noqa: E731
    with pytest.raises(InputError, match="no conv or dot takes a weight from `variables`"):
        trace(closed, {"scale": np.float32(1.0)}, normal(rng_of(0), 2, 6))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (X[0], r"float32\[6, 6, 3\]"),  # rank
        (X.astype(np.int32), r"int32\[2, 6, 6, 3\]"),  # dtype
        (X[..., :2], r"float32\[2, 6, 6, 2\]"),  # channels
    ],
)
def test_input_that_does_not_fit_is_quoted(x, text):
    with pytest.raises(InputError, match=rf"fails for x of \['{text}'\]"):
        trace(*residual_net(), x)


@pytest.mark.user_model
def test_errors_of_the_users_framework_are_input_errors():
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), np.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match=r"fails for x of \['float32\[2, 5\]'\]"):
        trace(model.apply, variables, np.zeros((2, 5), np.float32))


def test_calibration_of_the_wrong_shape_is_an_input_error():
    apply, variables = residual_net()
    with pytest.raises(InputError, match=r"fails for x of \['float32\[8, 6, 6, 2\]'\]"):
        aq.quantize(apply, variables, images(0, 8, channels=2), aq.recipes.nearest(batch_size=8))
