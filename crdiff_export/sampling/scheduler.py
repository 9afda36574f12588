"""The scheduler that a base's prediction needs, where the configuration beside it is another model's.

A single file brings no configuration: it comes from a folder or from the Hub, and is often that of the family's first
model. What a base's own marks say is followed instead.
"""

from collections.abc import Mapping
from typing import Any

from crdiff_export.errors import PreviewError
from crdiff_export.models.prediction import EDM_V_SCHEDULER, PREDICTION_KEY, SIGMAS, Prediction


def scheduler_change(prediction: Prediction, config: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]] | None:
    """Find out how a configured scheduler has to change for a model.

    Args:
        prediction: What the model predicts.
        config: The configured scheduler: its `scheduler_config.json`.
        name: The base, for messages.

    Returns:
        The scheduler's class and the settings to change; None if it is right as it is.

    Raises:
        PreviewError: The configuration is for another kind of model, and more than the scheduler would be wrong.
    """
    if prediction.kind == "other":
        raise PreviewError(
            f"{name}: its marks are of no prediction that is known here ({PREDICTION_KEY}, {', '.join(SIGMAS)})",
            "Correct them if they are wrong; `crdiff export` takes it as it is.",
        )
    configured, is_edm = str(config.get("_class_name")), prediction.kind == "edm"
    settings = prediction.scheduler_settings
    if prediction.kind == "edm-v":
        return EDM_V_SCHEDULER, settings
    if is_edm != configured.startswith("EDM"):
        # Playground v2.5: its VAE has a mean and a deviation of its own, too.
        needed = "EDM (as Playground v2.5 is)" if is_edm else f"{prediction.kind}-prediction"
        hint = "Give --config with the folder or the repository of this very model"
        raise PreviewError(
            f"{name}: the base is marked as {needed}, the configuration's scheduler is {configured}",
            f"{hint}, such as playgroundai/playground-v2.5-1024px-aesthetic." if is_edm else f"{hint}.",
        )
    if is_edm:
        return None
    if prediction.zero_snr is False and config.get("rescale_betas_zero_snr"):
        settings["rescale_betas_zero_snr"] = False
    return None if all(config.get(key) == value for key, value in settings.items()) else (configured, settings)
