"""Any preference files as a TFDS data set."""

from jaxalign.data.builders.preference_builder import FilesConfig, PreferenceBuilder


class PreferenceFiles(PreferenceBuilder):
    """Preference pairs of your own files: `prepare("preference_files/NAME", files={...})`."""

    ABOUT = "Preference pairs from files in any form that jaxalign.data reads."
    BUILDER_CONFIGS = (FilesConfig(name="default"),)
