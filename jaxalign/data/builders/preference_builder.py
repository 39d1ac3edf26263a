"""The common part of preference builders: features, and rows of files as records."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from jaxalign.data.forms import preference_of_row
from jaxalign.data.reading import BadRecordError, BadRecords, ReadReport, Row, path_rows, refuse
from jaxalign.data.records import PreferenceRecord, Text
from jaxalign.errors import UserError


@dataclasses.dataclass(eq=False, kw_only=True)
class FilesConfig(tfds.core.BuilderConfig):
    """A named variant of a data set, and the files of its splits."""

    files: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """The files of the publisher by split, in the folder given to `prepare` or below the URL."""


class PreferenceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads files with the project's own reader and stores prompt, chosen and rejected.

    Conversations are stored as JSON text, and `form` says so.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "jaxalign.data.builders.prepare(name, files or folder)"
    # TFDS finds it through importlib_resources, which it forgets to require (4.9.10)
    code_path = tfds.core.Path(__file__)
    URL: ClassVar[str | None] = None
    ABOUT: ClassVar[str] = ""
    CITATION: ClassVar[str] = ""

    BAD_RECORDS: ClassVar[BadRecords] = "error"

    def __init__(
        self,
        *,
        files: Mapping[str, Sequence[str]] | None = None,
        bad_records: BadRecords | None = None,
        download: bool = False,
        **options: Any,
    ):
        self.reports: dict[str, ReadReport] = {}
        self._files = files
        self._bad_records: BadRecords = bad_records or self.BAD_RECORDS
        self._download = download
        super().__init__(**{"file_format": "array_record"} | options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.ABOUT,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {name: text() for name in ("prompt", "chosen", "rejected", "form")}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self.builder_config
        wanted = self._files or (config.files if isinstance(config, FilesConfig) else {})
        if not wanted:
            raise UserError(f"tfds:{self.name}: no files; call jaxalign.data.builders.prepare")
        paths = {
            split: [self._path(file, dl_manager) for file in files]
            for split, files in wanted.items()
        }
        return {split: self._generate_examples(split, files) for split, files in paths.items()}

    def _path(self, file: str, dl_manager: Any) -> str:
        path = Path(file)
        if not path.is_absolute():
            path = Path(dl_manager._manual_dir or ".") / file
        if path.exists():
            return str(path)
        if not self._download or self.URL is None:
            where = "" if self.URL is None else f" (or pass download=True: {self.URL}{file})"
            raise UserError(f"tfds:{self.name}: {path} does not exist; put the file there{where}")
        # TFDS names downloads by hash: keep the extension, which selects the reader
        fetched = Path(dl_manager.download(self.URL + file))
        named = fetched.with_name(f"{fetched.stem}_{Path(file).name}")
        if not named.exists():
            named.hardlink_to(fetched)
        return str(named)

    def _generate_examples(
        self, split: str, files: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, str]]]:
        report = self.reports.setdefault(split, ReadReport())
        for number, file in enumerate(files):
            for row in self.rows(file, split):
                report.read += 1
                try:
                    record = self.record(row)
                except BadRecordError as fault:
                    refuse(row, fault, self._bad_records, report)
                    continue
                yield f"{number:05d}:{row.line:09d}", stored(record)

    def rows(self, file: str, split: str) -> Iterator[Row]:
        """Rows of a file that belong to a split."""
        return path_rows(Path(file))

    def record(self, row: Row) -> PreferenceRecord:
        """The row's pair."""
        return preference_of_row(row)


def stored(record: PreferenceRecord) -> dict[str, str]:
    """The features of a record."""
    sides = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    if all(isinstance(side, str) for side in sides.values()):
        return {name: str(side) for name, side in sides.items()} | {"form": "text"}

    def text(side: Text) -> str:
        return json.dumps(side, ensure_ascii=False)

    return {name: text(side) for name, side in sides.items()} | {"form": "messages"}
