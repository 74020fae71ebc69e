"""The one exception that bad input raises."""


class InputError(ValueError):
    """What the caller passed cannot be used; the message names the offender and both values.

    A ``ValueError``, so library users catch it as they would any other; the launchers
    print it as one line and exit with code 2 instead of showing a traceback.
    """


class ReconstructionError(RuntimeError):
    """Reconstruction of a unit failed; the message names its layers."""
