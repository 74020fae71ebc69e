import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import aquant_jax as aq
from aquant_jax.graph.subgraph import (
    BlockInputs,
    constant_values,
    extract_subgraph,
    run,
    same_elements,
    signature,
    source_tensor,
)
from aquant_jax.graph.trace import trace
from aquant_jax.plan.block_program import make_block_program
from tests.support.nets import conv, images, mlp, normal, relative_error, residual_net, rng_of

NEAREST = aq.recipes.nearest(batch_size=8)


def prepared(blocks=1):
    apply, variables = residual_net(blocks=blocks)
    return aq.prepare(apply, variables, images(0, 8), NEAREST)


def test_a_program_holds_only_what_its_outputs_need():
    net = prepared()
    stem, block = net.blocks[:2]
    first = extract_subgraph(net.graph, (), stem.end)
    second = extract_subgraph(net.graph, block.start, block.end)
    assert [op.layer.path for op in first.weighted] == ["stem/kernel"]
    assert first.model_inputs == net.graph.inputs
    assert [op.layer.path for op in second.weighted] == list(block.layers)
    assert second.model_inputs == ()
    assert not {id(op) for op in first.ops} & {id(op) for op in second.ops}


def test_constant_values_are_evaluated_without_the_input():
    variables = {"a": normal(rng_of(0), 3, 4), "b": normal(rng_of(1), 4)}
    apply = lambda v, x: x @ (v["a"] * jnp.exp(v["b"])[None])  # noqa: E731
    graph = trace(apply, variables, np.ones((2, 3), np.float32))
    (layer,) = graph.layers
    (value,) = constant_values(graph, variables, [layer.weight]).values()
    np.testing.assert_allclose(value, variables["a"] * np.exp(variables["b"]), rtol=1e-6)


def test_reads_are_intercepted_except_by_views():
    """Every reader sees the read value, once: a view hands its operand on unread."""
    graph = trace(
        lambda v, x: jnp.sin((x @ v["w"]).reshape(2, 2, 2)) + 1.0,
        {"w": normal(rng_of(0), 3, 4)},
        np.ones((2, 3), np.float32),
    )
    program = extract_subgraph(graph, (), graph.outputs)
    seen = []

    def read(value_id, value):
        seen.append(graph.producers()[value_id].name)
        return value + 1.0

    x = np.ones((2, 3), np.float32)
    weighted = lambda op, x: jnp.zeros((2, 4))  # noqa: E731
    inputs = BlockInputs(model=[x], constants=[None] * len(program.constants))
    (y,) = run(program, inputs, weighted, read)
    assert seen == ["reshape", "sin"]
    np.testing.assert_allclose(y, np.full((2, 2, 2), np.sin(1.0) + 1.0 + 1.0), rtol=1e-6)


def test_views_have_the_tensor_they_show_as_source():
    def apply(v, x):
        h = conv(x, v["a"])
        pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        view = jnp.pad(pooled, ((0, 0), (1, 1), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        return conv(view, v["b"]), conv(jnp.tanh(h), v["b"])

    kernels = {"a": normal(rng_of(0), 3, 3, 3, 4), "b": normal(rng_of(1), 3, 3, 4, 4)}
    graph = trace(apply, kernels, images(0, 2))
    producers = graph.producers()
    first, second, third = [op for op in graph.ops if op.layer]
    assert source_tensor(producers, second.x) == first.outputs[0]
    assert source_tensor(producers, third.x) == third.x
    assert same_elements(producers, second.x).name == "transpose"
    assert same_elements(producers, first.outputs[0]) is None


def test_signature_is_equal_for_equal_functions_only():
    net = prepared(blocks=3)
    programs = [make_block_program(net.graph, net.plan, b.start, b.targets) for b in net.blocks]
    stem, one, two, three, head = (signature(net.graph, p.subgraph) for p in programs)
    assert one == two == three
    assert len({stem, one, head}) == 3
    assert programs[1].key == programs[2].key


def test_signature_tells_activation_functions_and_constants_apart():
    def layer(activation):
        apply = lambda v, x: activation(x @ v["w"])  # noqa: E731
        graph = trace(apply, {"w": np.eye(3, dtype=np.float32)}, np.ones((2, 3), np.float32))
        return signature(graph, extract_subgraph(graph, (), graph.outputs))

    functions = [jax.nn.relu, jax.nn.relu6, jnp.tanh, lambda x: x * 2.0, lambda x: x * 3.0]
    assert len({layer(f) for f in functions}) == len(functions)
    assert layer(jax.nn.relu) == layer(jax.nn.relu)


def test_programs_with_other_bits_have_other_keys():
    apply, variables = residual_net(blocks=2)
    recipe = NEAREST.replace(overrides=({"pattern": "block_2", "weight_bits": 3},))
    net = aq.prepare(apply, variables, images(0, 8), recipe)
    one, two = (
        make_block_program(net.graph, net.plan, b.start, b.targets).key for b in net.blocks[1:3]
    )
    assert one != two


def test_a_program_of_two_halves_is_the_whole():
    apply, variables = mlp()
    x = normal(rng_of(2), 5, 6)
    graph = trace(apply, variables, x)
    middle = [op for op in graph.ops if op.layer][1].x
    values = constant_values(graph, variables, [layer.weight for layer in graph.layers])
    weighted = lambda op, x: op.call(x, values[op.layer.weight])[0]  # noqa: E731
    by_id = dict(zip(graph.variables, jax.tree.leaves(variables), strict=True))

    def evaluate(boundary_inputs, given, outputs):
        program = extract_subgraph(graph, boundary_inputs, outputs)
        inputs = BlockInputs(
            given, [x for _ in program.model_inputs], [by_id[i] for i in program.constants]
        )
        return run(program, inputs, weighted)

    half = evaluate((), (), (middle,))
    (y,) = evaluate((middle,), half, graph.outputs)
    assert relative_error(y, apply(variables, x)) < 1e-6
