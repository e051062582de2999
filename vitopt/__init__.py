"""Vision Transformers made smaller and faster, and measured."""

__version__ = "0.1.0"


def load(folder):
    """The model of a finished run; see `vitopt.runs.load`."""
    from vitopt import runs  # torch and timm take seconds to import: `vitopt schema` and `report` need neither
    return runs.load(folder)
