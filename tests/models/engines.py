"""Which engines this machine can run."""

from models.engines import choose_engine

# Why the event engine cannot run: it wants a C++ compiler, which a user may not have. None if it can.
_, LACKING = choose_engine("auto", "cpu")


def available():
    """The names of the engines."""
    return ["dense"] if LACKING else ["dense", "events"]
