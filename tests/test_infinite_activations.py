"""Networks that compute infinity or NaN: masks are no error, anything else is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax.reconstruction.loss import network_loss
from tests.support.nets import mlp, normal, relative_error, rng_of

MASK = np.array([True, True, False, True])
COMPILER = aq.Compiler()
LOWEST = np.finfo(np.float32).min
RECIPES = [aq.recipes.nearest(8, 8), aq.recipes.brecq(8, None, steps=2)]


@pytest.mark.parametrize("fill", [np.float32(-np.inf), LOWEST, np.float16(-np.inf)], ids=repr)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.preset)
def test_masked_logits_are_left_out_of_the_error(fill, recipe):
    apply, variables = mlp()
    x = normal(rng_of(1), 64, 6)

    def masked(variables, x):
        return jnp.where(MASK, apply(variables, x).astype(fill.dtype), fill)

    network = aq.quantize(masked, variables, x, recipe, observer=aq.Observer(), compiler=COMPILER)
    logits, outputs = apply(variables, x), np.asarray(network(x))
    assert (outputs[:, ~MASK] == fill).all()
    assert relative_error(outputs[:, MASK], logits[:, MASK]) < 0.02
    assert 0 < network.reports[-1].final_error < 1e-3 * float(jnp.square(logits).sum(1).mean())


@pytest.mark.parametrize("fill", [-np.inf, LOWEST])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_loss_of_a_network_and_its_gradient_are_those_of_the_logits(kind, fill):
    target, output = (normal(rng_of(i), 5, 4) for i in (0, 1))

    def loss(output, fill):
        kept = MASK if kind == "kl" else np.ones(4, bool)
        pair = (jnp.where(MASK, value, fill)[:, kept] for value in (output, target))
        return network_loss(kind, [()], [next(pair)], [next(pair)])

    def masked(output):
        pair = [jnp.where(MASK, value, np.float32(fill)) for value in (output, target)]
        return network_loss(kind, [()], pair[:1], pair[1:])

    wanted = jax.value_and_grad(loss)(output, np.float32(0.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                 jax.value_and_grad(masked)(output), wanted)  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_block_that_is_not_finite_in_float_is_named_with_its_sample(bad, dtype):
    _, (first, second, _) = mlp()
    x = normal(rng_of(1), 64, 6)
    x[40] = 100.0

    def apply(variables, x):
        hidden = x.astype(dtype) @ variables["a"]
        # Of a NaN that it sees in place of a value, XLA's exponential on a CPU makes that value.
        odd = hidden + jnp.where(x[:, :1] == 100.0, dtype(bad), 0)
        return jax.nn.softmax(odd) @ variables["b"]

    variables = jax.tree.map(lambda w: w.astype(dtype), {"a": first["w"], "b": second["w"]})
    recipe = aq.recipes.nearest(8, None, blocks=("a", "b"), init_samples=8)
    with pytest.raises(aq.ReconstructionError, match=r"^a: .* NaN or infinity .* sample 40, in"):
        aq.quantize(apply, variables, x, recipe, observer=aq.Observer(), compiler=COMPILER)
