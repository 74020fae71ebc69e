"""MLIR contexts that many programs share while the tests run."""

from jax._src.interpreters import mlir

PROGRAMS = 100  # a context keeps the types, constants and locations of all of its programs


def share() -> None:
    """JAX lowers `PROGRAMS` programs in one context. It makes one for each otherwise, 2.5 ms a
    context: a twelfth of the time of tests that compile many small programs."""
    make, count, context = mlir.make_ir_context, 0, None

    def make_ir_context():
        nonlocal count, context
        if count % PROGRAMS == 0:
            context = make()
        count += 1
        return context

    mlir.make_ir_context = make_ir_context
