"""What is raised, and how an exception of somebody else's is told in one line."""


class InputError(ValueError):
    """What the caller passed cannot be used; the message names the offender and both values.

    A ``ValueError``, so library users catch it as they would any other; the launchers
    print it as one line and exit with code 2 instead of showing a traceback.
    """


class ReconstructionError(RuntimeError):
    """Reconstruction of a unit failed; the message names its layers."""


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing.

    >>> reason(KeyError()), reason(FileNotFoundError(2, "No such file", "x"))
    ('KeyError', 'No such file')
    """
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0]
