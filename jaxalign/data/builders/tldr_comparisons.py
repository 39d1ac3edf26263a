"""TL;DR comparisons: human choices between two summaries of a post (Stiennon et al., 2020)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxalign.data.builders.preference_builder import FilesConfig, PreferenceBuilder
from jaxalign.data.forms import preference_of_row
from jaxalign.data.reading import BadRecordError, Row, json_lines
from jaxalign.data.records import PreferenceRecord

PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
BATCHES = tuple(f"batch{number}.json" for number in range(3, 21))


class TldrComparisons(PreferenceBuilder):
    """Batches of comparisons; each row names its split, train or one of two valid ones."""

    ABOUT = "Human choices between two summaries of a Reddit post."
    CITATION = "Stiennon et al., 2020, Learning to summarize from human feedback, arXiv:2009.01325"
    URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
    BAD_RECORDS = "skip"
    BUILDER_CONFIGS = (
        FilesConfig(
            name="comparisons",
            description="Posts alone; news articles are left out.",
            files={"train": BATCHES, "valid": BATCHES},
        ),
    )

    def rows(self, file: str, split: str) -> Iterator[Row]:
        """Rows whose own split begins with the requested one; the files are JSON Lines."""
        for row in json_lines(Path(file)):
            value = row.value if isinstance(row.value, dict) else {}
            info = value.get("info")
            article = isinstance(info, dict) and "post" not in info
            if not article and str(value.get("split", split)).startswith(split):
                yield row

    def record(self, row: Row) -> PreferenceRecord:
        """The chosen summary and the other one."""
        if row.fault is not None:
            raise row.fault
        return preference_of_row(replace(row, value=comparison(row.value)))


def comparison(value: Any) -> dict[str, str]:
    """Prompt, chosen and rejected of a comparison in OpenAI's form."""
    try:
        info, choice = value["info"], value["choice"]
        texts = [summary["text"] for summary in value["summaries"]]
        prompt = PROMPT.format(**{key: info[key] for key in ("subreddit", "title", "post")})
        return {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}
    except (KeyError, TypeError, IndexError) as error:
        raise BadRecordError("missing field", f"not a comparison of summaries: {error}") from None
