"""Which engines this machine can run."""

from models.engines import choose_engine


def available():
    """The names of the engines: the event engine wants a C++ compiler, which a user may not have."""
    engine, _ = choose_engine("auto", "cpu")
    return ["dense"] if engine.name == "dense" else ["dense", "events"]
