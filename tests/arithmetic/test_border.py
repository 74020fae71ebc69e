import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import register_border
from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.border_start import check_start
from aquant_jax.arithmetic.uniform import quantize, to_units
from aquant_jax.errors import InputError
from tests.support import numpy_reference as reference
from tests.support.analytic_border import analytic_border
from tests.support.nets import normal, rng_of

CUSTOM = "test_sawtooth"
NAMES = [*sorted(borders.BORDERS), CUSTOM]
SIZES = (1, 3)


@pytest.fixture(autouse=True, scope="module")
def custom_border():
    """A border that the table does not have: b0 + b1 sin(u)."""

    def init(shape, half):
        return {"b0": jnp.full(shape, half, jnp.float32), "b1": jnp.zeros(shape, jnp.float32)}

    def apply(coefficients, u):
        return coefficients["b0"] + coefficients["b1"] * jnp.sin(u)

    register_border(CUSTOM, init, apply)
    yield
    del borders.BORDERS[CUSTOM]


def columns(seed, taps, shape=(3, 4), channels=4):
    return [2.0 * normal(rng_of((seed, tap)), *shape, channels) for tap in range(taps)]


def wide(coefficients, us):
    """Coefficients [taps, C] shaped to the rank of `us` [..., C]."""
    shape = (-1, *[1] * (us[0].ndim - 1), us[0].shape[-1])
    return {name: jnp.reshape(c, shape) for name, c in coefficients.items()}


def start(name, phi, taps, channels=4):
    return borders.get(name).init((taps, channels), borders.get_phi(phi).half)


def moved(coefficients, seed, size=0.05):
    return {
        name: c + size * normal(rng_of((seed, i)), *c.shape)
        for i, (name, c) in enumerate(sorted(coefficients.items()))
    }


@pytest.mark.parametrize("phi", sorted(borders.PHIS))
@pytest.mark.parametrize("shared_across_taps", [True, False], ids=["fused", "each"])
@pytest.mark.parametrize("name", NAMES)
class TestContract:
    """What every border function owes to the library."""

    def test_init_is_exactly_one_half(self, name, shared_across_taps, phi):
        for size in SIZES:
            us, coefficients = columns(0, size**2), start(name, phi, size**2)
            assert {c.shape for c in coefficients.values()} == {(size**2, 4)}
            assert {c.dtype for c in coefficients.values()} == {jnp.dtype("float32")}
            found = borders.borders(name, phi, shared_across_taps, wide(coefficients, us), us)
            assert len(found) == (1 if shared_across_taps else size**2)
            for border in found:
                np.testing.assert_array_equal(border, np.full(us[0].shape, 0.5, np.float32))

    def test_codes_are_those_of_nearest_at_the_start(self, name, shared_across_taps, phi):
        for size in SIZES:
            us = [np.round(4 * u) / 4 for u in columns(1, size**2)]  # many ties
            found = borders.borders(
                name, phi, shared_across_taps, wide(start(name, phi, size**2), us), us
            )
            for tap, u in enumerate(us):
                bound = found[0 if shared_across_taps else tap]
                np.testing.assert_array_equal(quantize(u, 2.0, 3, bound), quantize(u, 2.0, 3))

    def test_jit_and_vmap_agree_with_eager(self, name, shared_across_taps, phi):
        us = columns(2, 4)
        coefficients = moved(start(name, phi, 4), 3)

        def run(us, coefficients):
            return jnp.stack(
                borders.borders(name, phi, shared_across_taps, wide(coefficients, us), us)
            )

        eager = run(us, coefficients)
        np.testing.assert_allclose(jax.jit(run)(us, coefficients), eager, atol=1e-6)
        mapped = jax.vmap(run, in_axes=(0, None), out_axes=1)(us, coefficients)
        np.testing.assert_allclose(mapped, eager, atol=1e-6)

    def test_gradients_are_finite_and_reach_every_coefficient(self, name, shared_across_taps, phi):
        us, coefficients = columns(4, 4), moved(start(name, phi, 4), 5)

        def total(coefficients, us):
            found = borders.borders(name, phi, shared_across_taps, wide(coefficients, us), us)
            return sum(jnp.sum(b * jnp.cos(b)) for b in found)

        gradients, inputs = jax.grad(total, argnums=(0, 1))(coefficients, us)
        for gradient in jax.tree.leaves((gradients, inputs)):
            assert np.isfinite(gradient).all()
        for gradient in gradients.values():
            assert (np.abs(gradient) > 0).all()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_result_is_float32_in_the_range_of_phi(self, name, shared_across_taps, phi, dtype):
        us = [to_units(jnp.asarray(u, dtype), jnp.float32(2.0)) for u in columns(6, 4)]
        coefficients = moved(start(name, phi, 4), 7, size=1.0)
        for border in borders.borders(name, phi, shared_across_taps, wide(coefficients, us), us):
            assert border.dtype == jnp.float32
            assert border.shape == us[0].shape
            if phi != "identity":
                assert border.min() >= 0.0
                assert border.max() <= 1.0 if phi == "sigmoid" else border.max() < 1.0


@pytest.mark.parametrize("shared_across_taps", [True, False])
@pytest.mark.parametrize("phi", ["identity", "clamp", "sigmoid"])
@pytest.mark.parametrize("name", ["constant", "linear", "quadratic"])
def test_borders_are_those_of_the_numpy_reference(name, phi, shared_across_taps):
    us, coefficients = columns(8, 9), moved(start(name, phi, 9), 9)
    expected = reference.column_borders(
        np.stack(us, axis=-2), jax.tree.map(np.asarray, coefficients), phi, shared_across_taps
    )
    found = borders.borders(name, phi, shared_across_taps, wide(coefficients, us), us)
    for tap in range(9):
        np.testing.assert_allclose(
            found[0 if shared_across_taps else tap], expected[..., tap, :], atol=1e-6
        )


def test_phi_comes_after_the_mean_of_the_taps():
    us = [jnp.zeros((1, 1))] * 2
    coefficients = {"b0": jnp.array([[[-1.0]], [[1.6]]])}
    (border,) = borders.borders("constant", "clamp", True, coefficients, us)
    assert border.item() == pytest.approx(0.3)


@pytest.mark.parametrize("shared_across_taps", [True, False])
def test_jit_gives_numpys_codes_on_dyadic_inputs(shared_across_taps):
    """All intermediate values are exact in float32, so every order of operations agrees."""
    rng = rng_of(10)
    us = [(rng.integers(-64, 65, (50, 8)) / 8).astype(np.float32) for _ in range(4)]
    coefficients = {
        name: (rng.integers(-8, 9, (4, 8)) / scale).astype(np.float32)
        for name, scale in (("b0", 16), ("b1", 64), ("b2", 512))
    }
    expected_borders = reference.column_borders(
        np.stack(us, -2), coefficients, "clamp", shared_across_taps
    )
    expected = reference.Live.codes(np.stack(us, -2) - expected_borders, 4, 3)

    @jax.jit
    def codes(us, coefficients):
        found = borders.borders(
            "quadratic", "clamp", shared_across_taps, wide(coefficients, us), us
        )
        found = found * (4 if shared_across_taps else 1)
        return [quantize(u, 4.0, 3, b) for u, b in zip(us, found, strict=True)]

    np.testing.assert_array_equal(np.stack(codes(us, coefficients), -2), expected)


@pytest.mark.parametrize("shared_across_taps", [True, False])
@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_jit_gives_numpys_codes_on_near_ties(name, shared_across_taps):
    """A contraction of any product with the addition behind it gives other codes here."""
    rng, one = rng_of(11), np.float32
    taps = rng.integers(1, 7, (9, 1, 4096)) + rng.uniform(-0.3, 0.3, 4096)
    us = list(taps.astype(one))
    b1, b2 = (rng.uniform(*ends, (9, 4096)) for ends in ((0.5, 1.5), (0.05, 0.15)))
    polynomials = {"linear": {"b1": b1}, "quadratic": {"b1": b1, "b2": b2}}[name]
    u = np.stack(us)[:, 0].astype(np.float64)
    learned = sum(c * u ** int(key[1]) for key, c in polynomials.items())
    # So u less the border is an integer, but for the last digits.
    coefficients = {"b0": (u - np.round(u)) - learned, **polynomials}
    coefficients = {key: c.astype(one) for key, c in coefficients.items()}
    stacked = np.stack(us, -2)
    v = stacked - reference.column_borders(stacked, coefficients, "identity", shared_across_taps)
    assert 0.02 < (v > np.round(v)).mean() < 0.98

    @jax.jit
    def codes(us, coefficients):
        found = borders.borders(name, "identity", shared_across_taps, wide(coefficients, us), us)
        found = found * (9 if shared_across_taps else 1)
        return jnp.stack([quantize(u, 4.0, 4, b) for u, b in zip(us, found, strict=True)], -2)

    np.testing.assert_array_equal(codes(us, coefficients), reference.Live.codes(v, 4, 4))


def test_border_below_one_keeps_zero_padding_at_zero():
    zero = jnp.zeros((1, 4))
    for b0 in (-3.0, 0.3, 1.0, 7.0):
        coefficients = {"b0": jnp.full((1, 1, 4), b0)}
        (border,) = borders.borders("constant", "clamp", True, coefficients, [zero])
        np.testing.assert_array_equal(quantize(zero, 2.0, 3, border), 2.0 + 0 * zero)


def test_straight_through_clamp_is_clamp_with_gradient_one():
    p = jnp.array([-0.5, 0.2, 1.5])
    clamp, ste = borders.get_phi("clamp"), borders.get_phi("clamp_ste")
    np.testing.assert_array_equal(ste.apply(p), clamp.apply(p))
    np.testing.assert_array_equal(jax.grad(lambda p: ste.apply(p).sum())(p), [1, 1, 1])
    np.testing.assert_array_equal(jax.grad(lambda p: clamp.apply(p).sum())(p), [0, 1, 0])
    assert ste.deployed == "clamp"


def test_powers_say_what_each_coefficient_multiplies():
    u = jnp.array([3.0])
    for name in ("constant", "linear", "quadratic"):
        border = borders.get(name)
        zeros = {key: jnp.zeros(1) for key in border.powers}
        for key, power in border.powers.items():
            value = border.apply({**zeros, key: jnp.ones(1)}, u)
            assert value.item() == 3.0**power


def test_unknown_names_are_listed_and_taken_names_refused():
    with pytest.raises(InputError, match=r"unknown border 'cubic'.*constant, linear, quadratic"):
        borders.get("cubic")
    with pytest.raises(InputError, match=r"unknown phi 'tanh'.*clamp, clamp_ste, identity"):
        borders.get_phi("tanh")
    with pytest.raises(InputError, match=r"'linear' is already registered"):
        register_border("linear", *borders.get("linear"))


# Eq. 4 and Eq. 7 on scalars, in units of the steps: the exact product is w x, the quantized one
# (w + dw) q, and q = ceil(x' - B).
SCALARS = [(1.0, 0.2), (1.0, -0.3), (0.7, 0.1), (2.0, 0.45), (-1.3, 0.25), (-1.0, -0.4)]


def product_error(q, x, weight, weight_error):
    return (weight + weight_error) * q - weight * x


@pytest.mark.parametrize(("weight", "weight_error"), SCALARS)
def test_eq4_minimises_the_elementwise_error(weight, weight_error):
    x = np.linspace(-8.0, 8.0, 4001)
    border = analytic_border(x, weight, weight_error)
    error = np.abs(product_error(np.ceil(x - border), x, weight, weight_error))
    for candidate in (np.floor(x), np.ceil(x), np.ceil(x - 0.5)):
        other = np.abs(product_error(candidate, x, weight, weight_error))
        assert (error <= other + 1e-9).all()
    half = np.abs(product_error(np.ceil(x - 0.5), x, weight, weight_error))
    assert half.mean() > 1.05 * error.mean()
    inside = (border > 0) & (border < 1)
    neighbours = np.isin(np.ceil(x - border)[inside] - np.floor(x)[inside], [0, 1])
    assert inside.any()
    assert neighbours.all()


@pytest.mark.parametrize(("weight", "weight_error"), SCALARS)
def test_eq4_makes_the_mean_error_zero_over_whole_periods(weight, weight_error):
    """Fig. 1: the error is a sawtooth in x whose period is (w + dw) / w."""
    period = abs((weight + weight_error) / weight)
    for periods in (1, 3, 10):
        x = 0.123 + periods * period * (np.arange(100000) + 0.5) / 100000
        border = analytic_border(x, weight, weight_error)
        mean = product_error(np.ceil(x - border), x, weight, weight_error).mean()
        assert abs(mean) < 2e-4
    whole = 10.0 * (np.arange(100000) + 0.5) / 100000
    half = product_error(np.ceil(whole - 0.5), whole, weight, weight_error).mean()
    assert abs(half) == pytest.approx(abs(weight_error) * 5.0, rel=1e-3)


@pytest.mark.parametrize(("weight", "weight_error"), SCALARS)
def test_eq7_minimises_the_error_against_the_noiseless_product(weight, weight_error):
    x = np.linspace(-4.0, 4.0, 2001)
    propagated = 0.3 * np.sin(5 * x) + 0.2
    noised = x + propagated
    border = analytic_border(noised, weight, weight_error, propagated)
    error = np.abs(product_error(np.ceil(noised - border), x, weight, weight_error))
    every = [np.abs(product_error(float(q), x, weight, weight_error)) for q in range(-12, 13)]
    np.testing.assert_allclose(error, np.min(every, axis=0), atol=1e-9)
    eq4 = analytic_border(noised, weight, weight_error)
    worse = np.abs(product_error(np.ceil(noised - eq4), x, weight, weight_error))
    assert worse.mean() > 1.05 * error.mean()


@pytest.mark.parametrize(
    ("p", "slope"), [(-0.1, 0), (0.0, 1), (0.5, 1), (borders.BELOW_ONE, 1), (1.0, 0)]
)
def test_the_clamp_passes_gradients_up_to_its_ends(p, slope):
    assert jax.grad(borders.get_phi("clamp").apply)(jnp.float32(p)) == slope


@pytest.mark.parametrize(
    ("init", "apply", "words"),
    [
        (
            lambda shape, half: {"b": jnp.ones(shape)}, lambda c, u: c["b"] * u,
            r"apply returns -8 at u = -8; it must return half, 0\.5, for every u$",
        ),
        (
            lambda shape, half: {"b": jnp.full(shape, half)},
            lambda c, u: jnp.where(u > 3, c["b"] + 0.25, c["b"]),
            r"apply returns 0\.75 at u = 4; it must return half, 0\.5, for every u$",
        ),
        (
            lambda shape, half: {"b": jnp.full(shape, half).at[2].set(jnp.nan)},
            lambda c, u: c["b"] + 0 * u,
            r"apply returns nan at u = -8; it must return half, 0\.5, for every u$",
        ),
        (
            lambda shape, half: {"b": jnp.full(shape[1:], half)}, lambda c, u: c["b"] + 0 * u,
            r"init\(\(4, 2\), 0\.5\) gives 'b' the shape \(2,\); it must be \(4, 2\)$",
        ),
        (lambda shape, half: 3, lambda c, u: u, r"init fails: 'int' object is not iterable$"),
        (
            lambda shape, half: {"b": jnp.full(shape, half)}, lambda c, u: c["a"],
            "apply fails: 'a'$",
        ),
    ],
    ids=["another constant", "some u", "one tap", "shape", "init fails", "apply fails"],
)  # fmt: skip
def test_a_border_that_does_not_start_at_half_is_an_error_at_its_first_use(init, apply, words):
    variables = {"kernel": np.eye(4, dtype=np.float32), "head": np.eye(4, dtype=np.float32)}
    register_border("off", init, apply)
    try:
        recipe = aq.recipes.aquant(border="off", steps=1, batch_size=4)
        with pytest.raises(InputError, match=rf"^border 'off': .*{words}"):
            aq.prepare(
                lambda v, x: x @ v["kernel"] @ v["head"], variables, variables["head"], recipe
            )
    finally:
        del borders.BORDERS["off"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": 3}, "name is of type int; it must be the name of a border"),
        ({"name": ""}, "name is empty; it must be the name of a border"),
        ({"init": None}, "init is of type NoneType; it must be a function"),
        ({"apply": {}}, "apply is of type dict; it must be a function"),
        ({"powers": ["b0"]}, "powers is of type list; it must be a dict"),
        ({"powers": {"b0": -1}}, "powers has 'b0': -1; it must have a whole number"),
        ({"needs_taps": "no"}, "needs_taps is of type str; it must be True or False"),
    ],
)
def test_an_argument_of_a_registration_that_cannot_be_used_is_named(changed, words):
    linear = borders.get("linear")
    arguments = {"name": "unused", "init": linear.init, "apply": linear.apply} | changed
    before = dict(borders.BORDERS)
    with pytest.raises(InputError, match=f"^{words}"):
        inspect.unwrap(register_border)(**arguments)  # without the check of tests/support
    assert before == borders.BORDERS


def test_a_power_of_no_coefficient_is_an_error_at_the_first_use(monkeypatch):
    monkeypatch.setitem(borders.BORDERS, "odd", borders.get("linear")._replace(powers={"c": 1}))
    with pytest.raises(InputError, match=r"^border 'odd': powers names 'c'; init gives b0, b1$"):
        check_start("odd", "identity")
