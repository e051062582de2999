"""Vision Transformers made smaller and faster, and measured."""

__version__ = "0.1.0"


def load(folder):
    """The model of a finished run, on the CPU and in eval mode; see `vitopt.model.load`."""
    from vitopt import model  # torch and timm take seconds to import: `vitopt schema` and `report` need neither
    return model.load(folder)
