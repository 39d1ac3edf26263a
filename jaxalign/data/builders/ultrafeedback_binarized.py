"""UltraFeedback, binarised: GPT-4's ratings made into pairs (Cui et al., 2023)."""

from jaxalign.data.builders.preference_builder import FilesConfig, PreferenceBuilder

SPLITS = {"train": "train_prefs", "test": "test_prefs"}


class UltrafeedbackBinarized(PreferenceBuilder):
    """Conversations of one turn; the pairs that Zephyr was trained on."""

    ABOUT = "The better-rated answer and a random other one of four, for 64k prompts."
    CITATION = "Cui et al., 2023, arXiv:2310.01377; Tunstall et al., 2023, arXiv:2310.16944"
    URL = "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized/resolve/main/"
    BAD_RECORDS = "skip"  # pairs of equal ratings and equal text exist
    BUILDER_CONFIGS = (
        FilesConfig(
            name="prefs",
            description="The splits train_prefs and test_prefs.",
            files={
                split: [f"data/{name}-00000-of-00001.parquet"] for split, name in SPLITS.items()
            },
        ),
    )
