"""Vision Transformers made smaller and faster, and measured."""

__version__ = "0.1.0"

# torch and timm take seconds to import, and `vitopt schema` and `report` need neither: so each function imports its own


def create_model(name, num_classes=1000, **kwargs):
    """A timm model that knows its own arguments, so that it can be saved.

    Args:
        name: timm's name. kwargs: timm's keyword arguments; `pretrained` and `checkpoint` as in a recipe.
    """
    from vitopt import errors, model, recipe
    section = recipe.section(recipe.Model, {"name": name, **kwargs}, "model")
    if problems := model.check(section):
        raise errors.InputError(*problems)
    return model.build(section, num_classes)


def prune(model, ratio=None, *, calibration=None, example_inputs=None, **options):
    """Cut a timm model in place, and say what was done; see `vitopt.pruning.prune`.

    Args:
        ratio, options: as in a recipe's `prune` section: target, axes, importance, ranking, align, repair.
        calibration: batches of images and labels, for importances and repair that need data.
    """
    from vitopt import pruning, recipe
    options = {key: value for key, value in ({"ratio": ratio} | options).items() if value is not None}
    return pruning.prune(model, recipe.section(recipe.Prune, options, "prune"), calibration, example_inputs)


def save(model, folder):
    """Write a model, pruned or not, into a folder; see `vitopt.model.save`."""
    from vitopt import model as models
    models.save(model, folder)


def load(folder):
    """The model of a folder, on the CPU and in eval mode; see `vitopt.model.load`."""
    from vitopt import model
    return model.load(folder)
