"""``allocate`` on small networks, with layers rounded to nearest."""

import io
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import aquant_jax as aq
from aquant_jax.allocation import measure
from aquant_jax.allocation.costs import count_costs
from aquant_jax.allocation.measure import FILE
from aquant_jax.allocation.networks import prepare_networks
from aquant_jax.allocation.output_error import output_error
from aquant_jax.allocation.repair import LEFT
from aquant_jax.deployment.checkpoint import sizes
from tests.support.nets import images, mlp, normal, residual_net, rng_of

X = images(0, 16, size=5)
NET = residual_net()
CHOICES = [aq.Choice(w, a) for w in (2, 3, 4) for a in (2, 3, 4)]
RECIPE = aq.recipes.qdrop(3, 3, steps=0, finetune_loss="kl")
COMPILER = aq.Compiler()  # compiled functions of all tests
FREE = ("block_1/conv1/kernel", "block_1/conv2/kernel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The measurements of NET, which every test with this recipe reads."""
    path = tmp_path_factory.mktemp("measurements")
    assert allocate(aq.Budget(average_bits=3), path).measured == 23
    return path


def allocate(budget, folder=None, choices=CHOICES, recipe=RECIPE, net=NET, x=X, **options):
    options = {"compiler": COMPILER} | options
    return aq.allocate(*net, x, budget, choices, recipe=recipe, resume=folder, **options)


def rounded(recipe, net=NET, x=X):
    recipe = recipe.replace(steps=0)
    return aq.quantize(*net, x, recipe, observer=aq.Observer(), compiler=COMPILER)


def divergence(quantized):
    wanted, found = (jax.nn.log_softmax(y) for y in (NET[0](NET[1], X), quantized(X)))
    return float(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), -1)))


@pytest.mark.parametrize("limit", [{"bytes": 390}, {"average_bits": (2.5, 3.5)},
                                   {"bit_operations": 760_000}])  # fmt: skip
def test_the_quantized_network_costs_what_the_allocation_says(folder, limit):
    found = allocate(aq.Budget(**limit), folder)
    quantized = rounded(found.recipe)
    layers = {layer.path: layer for layer in quantized.summary()}
    assert found.costs["bytes"] == sizes(quantized).packed
    # Both convolutions have as many weights, and inputs of as many elements.
    assert found.costs["weight_bits"] == np.mean([layers[path].weight_bits for path in FREE])
    assert found.costs["act_bits"] == np.mean([layers[path].act_bits for path in FREE])
    products = {"stem": 25 * 27 * 4, "block_1": 25 * 36 * 4, "head": 20}
    assert found.costs["bit_operations"] == sum(
        products[path.split("/")[0]] * layer.weight_bits * (layer.act_bits or 32)
        for path, layer in layers.items()
    )
    assert all(found.costs[name] <= bound for name, bound in limits(limit).items())
    # What the recipe fixes stays.
    assert (layers["stem/kernel"].weight_bits, layers["stem/kernel"].act_bits) == (8, None)
    assert (layers["head/kernel"].weight_bits, layers["head/kernel"].act_bits) == (8, 8)


def limits(limit):
    ((name, value),) = limit.items()
    return (
        dict(zip(("weight_bits", "act_bits"), value, strict=True))
        if name == "average_bits"
        else limit
    )


def test_an_error_is_that_of_the_network_with_this_layer_quantized(folder):
    """Conv1's input is also read by the skip connection, which reads it rounded."""
    found = allocate(aq.Budget(average_bits=3), folder)
    alone = {(entry.path, entry.choice): entry.error for entry in found.table}
    for path in FREE:
        others = "|".join({"stem", "head", *FREE} - {path})
        overrides = ({"pattern": others, "keep_float": True},)
        recipe = RECIPE.replace(weight_bits=4, act_bits=2, overrides=overrides)
        assert alone[path, "w4a2"] == pytest.approx(divergence(rounded(recipe)), rel=1e-3)
    quantized = rounded(found.recipe)
    measured = output_error(quantized, *NET, X, None, "kl")
    assert measured == pytest.approx(divergence(quantized), rel=1e-3)
    assert found.degradation == pytest.approx(measured, rel=0.3)


def test_a_second_call_measures_nothing_and_a_torn_off_one_the_rest(folder, tmp_path):
    first = allocate(aq.Budget(average_bits=3), folder)
    assert first.measured == 0
    stored = json.loads((folder / FILE).read_text())
    del stored["errors"][FREE[1]]["w2a2"]
    (tmp_path / FILE).write_text(json.dumps(stored))
    again = allocate(aq.Budget(average_bits=3), tmp_path)
    assert again.measured == 1
    assert again.layers == first.layers
    with pytest.raises(aq.InputError, match=r"another call, which differs in calibration"):
        allocate(aq.Budget(average_bits=3), folder, x=X + 1)
    with pytest.raises(aq.InputError, match=r"steps \(0 there, 2 here\)") as error:
        allocate(aq.Budget(average_bits=3), folder, steps=2)
    assert "border_gain" not in str(error.value)  # of the whole recipe
    for damaged in ("x", None, float("nan")):
        stored["errors"][FREE[1]]["w2a2"] = damaged
        (tmp_path / FILE).write_text(json.dumps(stored))
        with pytest.raises(aq.InputError, match=r"sensitivity.json is damaged: it holds no errors"):
            allocate(aq.Budget(average_bits=3), tmp_path)
    (tmp_path / "b" / FILE).mkdir(parents=True)
    with pytest.raises(aq.InputError, match=r"sensitivity.json cannot be read: Is a directory"):
        allocate(aq.Budget(average_bits=3), tmp_path / "b")


def test_of_many_choices_weights_and_inputs_are_measured_apart(monkeypatch):
    """Sixteen choices of two layers, of which each takes eight errors; three of the pair."""
    monkeypatch.setattr(measure, "MOST_JOINT", 31)
    choices = [aq.Choice(w, a) for w in (2, 3, 4, 5) for a in (2, 3, 4, 5)]
    found = allocate(aq.Budget(average_bits=3), None, choices)
    assert found.measured == 2 * 8 + 3 + 2
    errors = {(entry.path, entry.choice): entry.error for entry in found.table}
    for path in FREE:
        sides = errors[path, "w2a5"] + errors[path, "w5a2"]
        assert errors[path, "w2a2"] + errors[path, "w5a5"] == pytest.approx(sides)
        others = "|".join({"stem", "head", *FREE} - {path})
        overrides = ({"pattern": others, "keep_float": True},)
        recipe = RECIPE.replace(weight_bits=5, act_bits=2, overrides=overrides)
        assert errors[path, "w5a2"] == pytest.approx(divergence(rounded(recipe)), rel=0.2)


def test_the_front_falls_from_the_least_to_the_most(folder):
    front = allocate(aq.Budget(average_bits=3), folder).front
    assert len(front) == 10
    errors = [point.degradation for point in front]
    assert errors == sorted(errors, reverse=True)
    assert (front[0].costs["weight_bits"], front[0].costs["act_bits"]) == (2, 2)


def test_the_cheapest_within_a_degradation(folder):
    found = allocate(aq.Budget(degradation=0.001, cost="bit_operations"), folder)
    assert found.degradation <= 0.001
    dearer = allocate(aq.Budget(bit_operations=found.costs["bit_operations"] - 1), folder)
    assert dearer.degradation > 0.001


def test_saved_edited_and_quantized(folder, tmp_path):
    found = allocate(aq.Budget(average_bits=3), folder)
    found.save(tmp_path / "a.json")
    loaded = aq.Allocation.load(tmp_path / "a.json")
    assert (loaded.recipe, loaded.front, loaded.table) == (found.recipe, found.front, found.table)
    assert str(loaded) == str(found)
    console = Console(file=io.StringIO(), width=100)
    console.print(loaded)
    shown = console.file.getvalue()
    assert "average_bits 3" in shown
    assert f"{FREE[0]} │ w" in shown
    assert " ".join(shown.splitlines()[-2:]).split() == str(found).splitlines()[-1].split()
    assert "float count" not in str(found)  # the stem's input is left out of the averages
    content = json.loads((tmp_path / "a.json").read_text())
    content["layers"][FREE[0]] = {"weight_bits": 7, "act_bits": 6}
    (tmp_path / "a.json").write_text(json.dumps(content))
    edited = aq.Allocation.load(tmp_path / "a.json")
    assert "w7a6" in str(edited)
    assert str(edited).splitlines()[-1].startswith("before the edits: predicted degradation")
    assert {s.path: s.weight_bits for s in rounded(edited.recipe).summary()}[FREE[0]] == 7
    # Bits that were measured have their costs; a layer that is deleted has the recipe's bits.
    content["layers"] = {FREE[1]: {"weight_bits": 2, "act_bits": 4}}
    (tmp_path / "b.json").write_text(json.dumps(content))
    edited = aq.Allocation.load(tmp_path / "b.json")
    *rows, costs = str(edited).splitlines()
    assert [row.split()[1] for row in rows[2:4]] == ["w3a3", "w2a4"]
    assert (
        f"before the edits; coefficients 0, bytes {sizes(rounded(edited.recipe)).packed}," in costs
    )
    content["layers"][FREE[0]] = {"weight_bits": 7, "act_bits": 6}
    floats = [entry | {"choice": "float"} for entry in content["table"] if entry["chosen"]]
    (tmp_path / "a.json").write_text(json.dumps(content | {"table": floats}))
    assert "w7a6" in str(aq.Allocation.load(tmp_path / "a.json"))
    for wrong, message in (
        ({"layers": {FREE[0]: {"weight_bits": 9}}}, "weight_bits is 9"),
        ({"table": [floats[0] | {"error": None}]}, "TypeError"),
        ({"degradation": math.nan}, "nan must be a number of 0 or more"),
        ({"costs": {"bytes": -1}}, "-1 must be a number of 0 or more"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content | wrong))
        with pytest.raises(aq.InputError, match=rf"a.json is malformed: .*{message}"):
            aq.Allocation.load(tmp_path / "a.json")


def test_float_and_weights_only_layers(tmp_path):
    choices = [aq.Choice(4, 4), aq.Choice(4), aq.Choice()]
    net, x = mlp(sizes=(6, 8, 8, 8, 4)), normal(rng_of(1), 16, 6)
    recipe = aq.recipes.aquant(3, 3)
    for average, wanted in (((18, 18), (None, None)), ((4, 18), (4, None))):
        found = allocate(aq.Budget(average_bits=average), tmp_path, choices, recipe, net, x)
        quantized = rounded(found.recipe, net, x)
        bits = {s.path: (s.weight_bits, s.act_bits) for s in quantized.summary()}
        borders = {s.path: s.border_function for s in quantized.summary()}
        assert {bits["1/w"], bits["2/w"]} == {(4, 4), wanted}
        assert bits["3/w"] == (8, 8)
        assert all((borders[path] == "quadratic") == (act is not None)
                   for path, (_, act) in bits.items())  # fmt: skip
        assert found.costs["bytes"] == sizes(quantized).packed
        assert str(found).endswith("(a16 and float count with the bits of their dtype)")
    with pytest.raises(aq.InputError, match=r"weights 40 is above the most, 32 \(a float co"):
        allocate(aq.Budget(average_bits=40), tmp_path, choices, recipe, net, x)


def test_weights_alone_leave_every_input_in_float():
    net, x = mlp(sizes=(6, 8, 8, 8, 4)), normal(rng_of(1), 16, 6)
    choices, recipe = [aq.Choice(2), aq.Choice(4)], aq.recipes.aquant(3, 3)
    found = allocate(aq.Budget(average_bits=3), None, choices, recipe, net, x)
    quantized = rounded(found.recipe, net, x)
    bits = [(s.weight_bits, s.act_bits) for s in quantized.summary()]
    assert bits in ([(8, None), *pair, (8, None)] for pair in itertools.permutations(
        [(2, None), (4, None)]))  # fmt: skip
    assert found.costs["bytes"] == sizes(quantized).packed


def test_some_layer_is_quantized():
    """With a recipe that fixes no layer, the most would be a network in float."""
    net, x = mlp(sizes=(6, 8, 4)), normal(rng_of(1), 16, 6)
    free = dict.fromkeys(("first_weight_bits", "last_weight_bits", "last_act_bits"))
    recipe, choices = aq.recipes.nearest(3, 3, **free), [aq.Choice(3, 3), aq.Choice()]
    found = allocate(aq.Budget(average_bits=20), None, choices, recipe, net, x)
    quantized = rounded(found.recipe_of(found.front[-1]), net, x)
    assert [spec.weight_bits for spec in quantized.specs].count(3) == 1
    with pytest.raises(aq.InputError, match=r"^choices leave every layer in float: there is"):
        allocate(aq.Budget(average_bits=20), None, choices[1:], recipe, net, x)


def test_a_float_input_is_float_where_a_rule_would_round_it():
    """The stem's activation is read by conv1, and by the sum."""
    choices, recipe = [aq.Choice(2, 2), aq.Choice()], RECIPE.replace(activations=("activation",))
    found = allocate(aq.Budget(average_bits=10), None, choices, recipe)
    quantized = rounded(found.recipe_of(found.front[-1]))
    assert {spec.path for spec in quantized.specs if spec.tensor} == {"head/kernel"}
    assert not any(key.startswith("stem") for key in quantized.activations)
    assert found.front[-1].costs["bytes"] == sizes(quantized).packed


def test_blocks_that_learn_repair_the_errors_before_them():
    """Four blocks, of which the recipe fixes the first and the last."""
    net, x = mlp(sizes=(6, 8, 8, 8, 4)), normal(rng_of(1), 16, 6)
    errors = []
    for steps, granularity in ((0, "block"), (100, "block"), (100, "layer")):
        recipe = aq.recipes.qdrop(3, 3, steps=steps, granularity=granularity)
        found = allocate(aq.Budget(average_bits=3), None, CHOICES, recipe, net, x)
        errors.append({(e.path, e.choice): e.error for e in found.table})
    assert errors[1]["1/w", "w2a3"] == pytest.approx(LEFT ** (2 / 3) * errors[0]["1/w", "w2a3"])
    assert errors[1]["2/w", "w2a3"] == pytest.approx(LEFT ** (1 / 3) * errors[0]["2/w", "w2a3"])
    assert errors[2] == pytest.approx(errors[0])


def two_readers():
    """Two layers that read the hidden tensor, and an output of both."""
    variables = {name: normal(rng_of(i), 6, 6) for i, name in enumerate(("first", "a", "b", "out"))}

    def apply(variables, x):
        h = jax.nn.relu(x @ variables["first"])
        y = jax.nn.relu(h @ variables["a"]) * jax.nn.relu(h @ variables["b"])
        return y @ variables["out"]

    return apply, variables


def test_readers_of_a_tensor_have_its_bits():
    """Without the constraint the second reader, which is charged nothing for them, has four."""
    net, x = two_readers(), normal(rng_of(9), 16, 6)
    budget, recipe = aq.Budget(average_bits=(4, 2.5)), aq.recipes.qdrop(3, 3)
    found = allocate(budget, None, CHOICES, recipe, net, x)
    quantized = rounded(found.recipe, net, x)
    bits = {s.path: s.act_bits for s in quantized.summary()}
    assert [found.layers[path].act_bits for path in "ab"] == [2, 2] == [bits["a"], bits["b"]]
    assert found.costs["bytes"] == sizes(quantized).packed


def test_borders_are_told_apart_by_a_short_reconstruction(tmp_path):
    choices = [aq.Choice(3, 3, "nearest"), aq.Choice(3, 3, "quadratic", "channel")]
    recipe = aq.recipes.aquant(3, 3, batch_size=8)
    options = {"net": mlp(), "x": normal(rng_of(1), 16, 6), "recipe": recipe}
    with pytest.raises(aq.InputError, match=r"w3a3 nearest, w3a3 quadratic.* in their borders"):
        allocate(aq.Budget(coefficients=30), None, choices, **options)
    found = allocate(aq.Budget(coefficients=30), tmp_path, choices, steps=2, **options)
    quantized = rounded(found.recipe, mlp(), options["x"])
    count = sum(c.size for s in quantized.summary() for c in (s.border or {}).values())
    assert found.costs["coefficients"] == count <= 30
    assert found.costs["bytes"] == sizes(quantized).packed
    assert allocate(aq.Budget(coefficients=48), tmp_path, choices, steps=2, **options).measured == 0
    assert allocate(aq.Budget(coefficients=0), tmp_path, choices, steps=2, **options).costs[
        "coefficients"] == 0  # fmt: skip


def test_fewer_choices_come_from_the_reconstructions_of_more(tmp_path):
    """Inputs of 3 bits come from the run at w3a3 then too, not from one at w2a3."""
    choices, fewer = ([aq.Choice(w, a) for w in bits for a in (2, 3)] for bits in ((2, 3), (2,)))
    options = {"net": mlp(sizes=(6, 8, 4)), "x": normal(rng_of(1), 8, 6), "steps": 1}
    free = {"last_weight_bits": None, "last_act_bits": None}
    options["recipe"] = aq.recipes.brecq(3, 3, batch_size=8, **free)
    first = allocate(aq.Budget(average_bits=2.5), tmp_path, choices, **options)
    stored = json.loads((tmp_path / FILE).read_text())
    assert stored["runs"] == {"w2": [2, 2], "w3": [3, 3], "a2": [2, 2], "a3": [3, 3]}
    del stored["errors"]["1/w"]["w2a3"]
    (tmp_path / FILE).write_text(json.dumps(stored))
    again = allocate(aq.Budget(average_bits=2.5), tmp_path, fewer, **options)
    assert (first.measured > 1, again.measured) == (True, 1)
    errors = {(entry.path, entry.choice): entry.error for entry in first.table}
    assert all(errors[entry.path, entry.choice] == entry.error for entry in again.table)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"w2a2", "w3a3"}


def test_latency_comes_from_a_table_or_from_this_device():
    recipe, x = aq.recipes.qdrop(3, 3), normal(rng_of(1), 16, 6)
    choices = [aq.Choice(2, 2), aq.Choice(4, 4)]
    table = {"0/w": {"w8a16": 1.0}, "1/w": {"w2a2": 2.0, "w4a4": 4.0}, "2/w": {"w8a8": 1.0}}
    found = allocate(aq.Budget(latency=5), None, choices, recipe, mlp(), x, latencies=table)
    assert (found.costs["latency"], found.layers["1/w"].weight_bits) == (4, 2)
    with pytest.raises(aq.InputError, match=r"latencies lack 1/w at 'w2a2'"):
        allocate(aq.Budget(latency=5), None, choices, recipe, mlp(), x, latencies={
            "0/w": {"w8a16": 1.0}, "1/w": {}})  # fmt: skip
    for wrong, message in (
        (float("nan"), "1/w at 'w2a2' is nan; it must be a number of 0 or more"),
        (-1, "1/w at 'w2a2' is -1"),
        ("fast", "1/w at 'w2a2' is 'fast'"),
    ):
        bad = table | {"1/w": {"w2a2": wrong, "w4a4": 4.0}}
        with pytest.raises(aq.InputError, match=message):
            allocate(aq.Budget(latency=5), None, choices, recipe, mlp(), x, latencies=bad)
    for wrong, message in (([1], "latencies is of type list"), ({"1/w": 1}, "1/w is of type int")):
        with pytest.raises(aq.InputError, match=message):
            allocate(aq.Budget(latency=5), None, choices, recipe, mlp(), x, latencies=wrong)
    with pytest.raises(aq.InputError, match=r"latency 1,000,000,000 is above the most"):
        allocate(aq.Budget(latency=1e9), None, choices, recipe, mlp(), x)


def test_samples_may_stand_on_any_axis():
    """Rows of all samples, samples last, and a rolled loop: costs and times are of one sample."""
    weights = {name: normal(rng_of(i), 6, 6) for i, name in enumerate("abc")}
    x, choices = normal(rng_of(3), 8, 5, 6), [aq.Choice(2, 2), aq.Choice(4, 4)]

    def rows(v, x):
        return (x.reshape(-1, 6) @ v["a"] @ v["b"] @ v["c"]).reshape(x.shape)

    def last(v, x):
        h = jnp.einsum("ij,jtb->itb", v["b"], jnp.einsum("ij,btj->itb", v["a"], x))
        return jnp.einsum("ij,jtb->bti", v["c"], h)

    def loop(v, x):
        def step(h, row):
            return ((row @ v["a"] + h) @ v["b"],) * 2

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 6)), jnp.swapaxes(x, 0, 1))[0] @ v["c"]

    recipe = aq.recipes.nearest(2, 2, first_weight_bits=None)
    for apply, steps in ((rows, 5), (last, 5), (loop, 1)):
        net = prepare_networks(apply, weights, x, choices, recipe, None)
        costs = count_costs(net.target, net.layers).layers["bit_operations"]
        found = {layer.path: cost[0] for layer, cost in zip(net.layers, costs, strict=True)}
        ones = {"a": 5 * 2 * 32, "b": 5 * 2 * 2, "c": steps * 8 * 8}
        assert found == {path: 36 * count for path, count in ones.items()}
        times = aq.layer_latencies(apply, weights, x, choices[:1], recipe=recipe)
        assert all(time > 0 for layer in times.values() for time in layer.values())


def test_inserted_zeros_are_no_bit_operations():
    """A transposed convolution of stride 2 multiplies every element by every tap."""

    def apply(v, x):
        return jax.lax.conv_transpose(x, v["up"], (2, 2), "VALID").mean((1, 2)) @ v["head"]

    variables = {"up": normal(rng_of(0), 2, 2, 3, 4), "head": normal(rng_of(1), 4, 2)}
    x, recipe = normal(rng_of(2), 8, 5, 5, 3), aq.recipes.nearest(2, 2, first_weight_bits=None)
    net = prepare_networks(apply, variables, x, [aq.Choice(2, 2)], recipe, None)
    cost = count_costs(net.target, net.layers).layers["bit_operations"]
    assert cost[0] == [5 * 5 * 2 * 2 * 3 * 4 * 2 * 32]


def test_bad_budgets_and_choices_are_named(folder):
    for fields, message in (
        ({}, "nothing given; exactly one of bytes, average_bits"),
        ({"bytes": 1, "latency": 2}, "bytes and latency given"),
        ({"bytes": -1}, "bytes is -1; it must be a number of 0 or more"),
        ({"average_bits": (3, 3, 3)}, "or a pair"),
        ({"degradation": 1, "cost": "size"}, "cost is 'size'; known: bytes"),
        ({"bytes": 9, "cost": "bytes"}, "cost 'bytes' belongs to degradation; bytes=9 is given"),
    ):
        with pytest.raises(aq.InputError, match=message):
            aq.Budget(**fields)
    for fields, message in (
        ({"weight_bits": 1}, "weight_bits is 1; it must be a whole number of 2 to 8"),
        ({"weight_bits": 3, "act_bits": True}, "act_bits is True"),
        ({"act_bits": 3}, "act_bits is 3 with float weights"),
        ({"weight_bits": 3, "border": "linear"}, "border 'linear' with act_bits None"),
        ({"weight_bits": 3, "act_bits": 3, "border_granularity": "no"}, "known: element, mean"),
    ):
        with pytest.raises(aq.InputError, match=message):
            aq.Choice(**fields)
    budget = aq.Budget(bytes=300)
    # Bits of NumPy would overflow in the costs.
    assert type(aq.Choice(np.int8(4), np.int64(4)).weight_bits) is int
    with pytest.raises(aq.InputError, match=r"choices is of type set; it must be a list of"):
        allocate(budget, folder, set(CHOICES))
    with pytest.raises(aq.InputError, match=r"choices are \[\]; there must be one or more"):
        allocate(budget, folder, [])
    with pytest.raises(aq.InputError, match=r"budget is 3; it must be an aq\.Budget"):
        allocate(3, folder)
    with pytest.raises(aq.InputError, match=r"compiler is of type int; it must be an aq\.Compiler"):
        allocate(aq.Budget(average_bits=3), folder, compiler=3)
    assert allocate(aq.Budget(average_bits=3), folder, steps=np.int64(0)).measured == 0


def test_budgets_out_of_reach_name_the_least_and_the_most(folder):
    with pytest.raises(aq.InputError, match=r"bytes 10 is below the least, \d+; the most is \d+$"):
        allocate(aq.Budget(bytes=10), folder)
    with pytest.raises(aq.InputError, match=r"of weights 5 is above the most, 4; .* no budget is"):
        allocate(aq.Budget(average_bits=5), folder)
    few = allocate(aq.Budget(average_bits=3), folder, [aq.Choice(w, 2) for w in (2, 3, 4)])
    assert few.costs["weight_bits"] <= 3
    with pytest.raises(
        aq.InputError, match=r"degradation 9 is above the most; it is .* least bytes, .* no budget"
    ):
        allocate(aq.Budget(degradation=9), folder)
    with pytest.raises(aq.InputError, match=r"^budget: bytes is 10+; it must be a number of 0"):
        aq.Budget(bytes=10**400)
    with pytest.raises(aq.InputError, match=r"point is of type int; it must be one of all"):
        few.recipe_of(3)
    with pytest.raises(aq.InputError, match=r"fixes every layer, 0/w at w8a16, 1/w at w8a8; fi"):
        allocate(aq.Budget(average_bits=3), net=mlp(sizes=(6, 8, 4)), x=normal(rng_of(1), 16, 6))
    fixed = RECIPE.replace(overrides=({"pattern": "conv2", "weight_bits": 8},))
    with pytest.raises(aq.InputError, match=r"bits of weights 3 is below the least, 5; .*"
                       r"overrides fix block_1/conv2/kernel at w8a2"):  # fmt: skip
        allocate(aq.Budget(average_bits=3), None, recipe=fixed)
    assert math.isfinite(allocate(aq.Budget(average_bits=(6, 3)), None, recipe=fixed).degradation)
