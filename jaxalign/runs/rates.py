"""Learning rates that are too high for pretrained weights."""

import jax

from jaxalign.config import TrainConfig
from jaxalign.errors import UserError
from jaxalign.models.folders import CONFIG_FILES, find_model, read_config
from jaxalign.stages import kinds_of
from jaxalign.stages.models import parameter_structs

HIGHEST = {False: 1e-4, True: 1e-3}
"""Whether adapters are trained -> highest rate without a warning."""
USUAL = {False: "1e-7 to 5e-5 is usual", True: "5e-6 to 5e-4 is usual"}
"""Whether adapters are trained -> rates of published recipes, the lower ones for preferences: 5e-7
(arXiv:2310.16944) and 1e-6 (TRL's DPOConfig), SFT 2e-5; adapters about ten times as much (TRL's
documentation)."""
LARGE = 50_000_000
"""Number of parameters from which the limits apply; small models tolerate higher rates."""


def is_large(model: str) -> bool:
    """Whether a model has at least `LARGE` parameters; reads only its config."""
    try:
        config = read_config(find_model(model, CONFIG_FILES))
    except UserError:
        return False  # the error is reported when it is loaded
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_structs(config))) >= LARGE


def high_rates(config: TrainConfig) -> dict[str, str]:
    """The stages whose learning rate would destroy what a pretrained model has learned.

    Args:
      config: of a run; update rules whose rates have another scale (sgd, adafactor relative to the
        parameters) are skipped.

    Returns:
      Stage -> warning about its rate, without the model's name.
    """
    warnings = {}
    for kind in kinds_of(config):
        rule, adapted = kind.settings(config).optimizer, kind.adapters(config) is not None
        relative = rule.name == "sgd" or (rule.name == "adafactor" and rule.parameter_scale)
        if not relative and rule.learning_rate > HIGHEST[adapted]:
            what = "adapters" if adapted else "all parameters"
            warnings[kind.name] = (
                f"learning rate {rule.learning_rate:g} for {what} ({USUAL[adapted]})"
            )
    return warnings
