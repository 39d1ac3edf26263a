"""HH-RLHF: human preferences between two dialogues (Bai et al., 2022)."""

from jaxalign.data.builders.preference_builder import FilesConfig, PreferenceBuilder

PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


class HhRlhf(PreferenceBuilder):
    """Two transcripts per row; the prompt is what they share, to the last assistant turn."""

    ABOUT = "Human preferences between two dialogues about helpfulness and harmlessness."
    CITATION = "Bai et al., 2022, Training a Helpful and Harmless Assistant, arXiv:2204.05862"
    URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/"
    BAD_RECORDS = "skip"  # a handful of empty and of identical responses
    BUILDER_CONFIGS = tuple(
        FilesConfig(
            name=part.replace("-", "_"),
            description=f"The part {part}.",
            files={split: [f"{part}/{split}.jsonl.gz"] for split in ("train", "test")},
        )
        for part in PARTS
    )
