"""Which weighted ops stay float, and why: in ``describe``, in ``summary``, and when saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from tests.support.nets import normal, relative_error, rng_of

X = normal(rng_of(0), 16, 6)
CLOSED_OVER = normal(rng_of(1), 6, 6)
VARIABLES = {name: normal(rng_of(i), 6, 6) for i, name in enumerate(("first", "loop", "head"), 2)}
LINE = "3 of 4 weighted ops quantized; float: loop (while: the number of its steps is not known)"


def apply(v, x):
    h = jax.nn.relu(x @ v["first"]) @ CLOSED_OVER
    go = lambda c: c[1] < jnp.abs(x).max()  # noqa: E731
    step = lambda c: (jnp.tanh(c[0] @ v["loop"]), c[1] + 1.0)  # noqa: E731
    return lax.while_loop(go, step, (h, jnp.float32(0)))[0] @ v["head"]


def nearest(**fields):
    return aq.recipes.nearest(8, 8, batch_size=8).replace(**fields)


def test_the_last_line_of_a_description_counts_and_names(tmp_path, capsys):
    assert aq.describe(aq.prepare(apply, VARIABLES, X, nearest())).splitlines()[-1] == LINE
    quantized = aq.quantize(apply, VARIABLES, X, nearest(), observer=aq.Observer())
    assert list(quantized.layers) == ["first", "closed_over/0", "head"]
    assert relative_error(quantized(X), apply(VARIABLES, X)) < 0.02
    aq.save(quantized, tmp_path / "saved")
    restored = aq.restore(tmp_path / "saved")
    np.testing.assert_array_equal(restored(X), quantized(X))
    aq.summary(restored)
    assert capsys.readouterr().out.splitlines()[-1] == LINE


def test_an_override_counts_as_a_reason():
    recipe = nearest(overrides=(aq.Override("head", keep_float=True),))
    line = aq.describe(aq.prepare(apply, VARIABLES, X, recipe)).splitlines()[-1]
    assert line.startswith("2 of 4 weighted ops quantized; float: head (override), loop (while")


def test_all_can_be_required():
    with pytest.raises(aq.InputError, match=r"^require_all: 3 of 4 weighted ops .* loop"):
        aq.prepare(apply, VARIABLES, X, nearest(require_all=True))
    plain = lambda v, x: jax.nn.relu(x @ v["first"]) @ v["head"]  # noqa: E731
    net = aq.prepare(plain, VARIABLES, X, nearest(require_all=True))
    assert aq.describe(net).endswith("2 of 2 weighted ops quantized")


def test_overrides_that_leave_nothing_to_quantize_are_an_error():
    recipe = nearest(overrides=(aq.Override("first|closed|head", keep_float=True),))
    with pytest.raises(
        aq.InputError, match=r"^overrides: keep_float leaves nothing .* of first, clo"
    ):
        aq.prepare(apply, VARIABLES, X, recipe)
    on_purpose = aq.prepare(
        apply, VARIABLES, X, nearest(overrides=(aq.Override(".*", keep_float=True),))
    )
    assert "0 of 4 weighted ops quantized" in aq.describe(on_purpose)


def test_a_weight_that_is_repeated_for_every_sample_stays_float():
    def attend(v, x):  # with learned queries; the loop's weight is cut to no columns
        queries = jnp.broadcast_to(v["loop"], (len(x), 6, 6))
        keys = jnp.einsum("nd,kd->nkd", x, jnp.eye(6))
        shares = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", queries, keys @ v["first"]))
        return {"mean": (shares @ keys).mean(1) @ v["head"], "none": x @ v["loop"][:, :0]}

    quantized = aq.quantize(attend, VARIABLES, X, nearest(), observer=aq.Observer())
    assert list(quantized.layers) == ["first", "head"]
    ((path, *_, reason),) = quantized.unquantized
    assert (path, reason) == ("loop", "its weight is repeated for every sample")
    found = quantized(X[:3])
    assert relative_error(found["mean"], attend(VARIABLES, X[:3])["mean"]) < 0.02
    assert found["none"].shape == (3, 0)


def test_a_function_that_takes_the_samples_in_chunks():
    def in_chunks(v, x):  # a rest is one more loop
        row = lambda x: jax.nn.relu(x @ v["first"]) @ v["head"]  # noqa: E731
        return lax.map(row, x, batch_size=4)

    assert len(aq.prepare(in_chunks, VARIABLES, X, nearest()).plan.layers) == 2
