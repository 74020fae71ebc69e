import numpy as np

from aquant_jax.graph.ir import path_names
from aquant_jax.graph.trace import trace
from tests.support.nets import images, residual_net


def graph():
    apply, variables = residual_net()
    return trace(apply, variables, images(0, 2))


def test_paths_are_those_of_the_leaves_in_order():
    tree = {"b": [np.zeros(1), {"c": np.zeros(2)}], "a": (np.zeros(3),)}
    assert path_names(tree) == ["a/0", "b/0", "b/1/c"]
    assert path_names(np.zeros(1)) == [""]


def test_paths_hide_what_a_framework_makes_variables_of():
    assert path_names({("params", "dense"): {"kernel": 1}}) == ["params/dense/kernel"]  # flat
    penzai = {"mlp/Linear.weights": {"value": {"data_array": 1}}}
    assert path_names(penzai) == ["mlp/Linear.weights"]
    assert path_names({"a": {"value": 1}, "b": {"value": 2, "c": 3}}) == ["a", "b/c", "b"]
    two = {"a": {"value": 1, "value/data_array": 2}}
    assert len(set(path_names(two))) == 2


def test_ops_are_in_topological_order():
    g = graph()
    known = {*g.inputs, *g.variables, *g.constants}
    for op in g.ops:
        assert {i for i in op.inputs if isinstance(i, int)} <= known
        known.update(op.outputs)
    assert set(g.outputs) <= known


def test_producers_and_consumers_are_inverse():
    g = graph()
    producers = g.producers()
    for value, readers in g.consumers().items():
        assert all(value in g.ops[index].reads for index in readers)
        if value in producers:
            assert value in producers[value].outputs
    assert sum(len(op.outputs) for op in g.ops) == len(producers)


def test_a_weighted_op_reads_its_activation_only():
    for op in graph().ops:
        if op.layer is not None:
            assert op.reads == (op.x,)
            assert op.layer.weight not in op.reads


def test_weight_dependent_values_depend_on_input_and_weight():
    g = graph()
    static = {out for op in g.ops for out in op.outputs} - g.dynamic
    assert g.weight_dependent <= g.dynamic
    assert not g.weight_dependent & set(g.inputs)
    assert not g.dynamic & set(g.variables)
    assert static  # the batch norm's rsqrt(var + eps)
    assert set(g.outputs) <= g.weight_dependent
