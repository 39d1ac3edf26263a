"""From files to a prepared TFDS data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.builders.preference_builder import FilesConfig, PreferenceBuilder
from jaxalign.data.reading import BadRecords, ReadReport
from jaxalign.errors import UserError

Files = Mapping[str, str | Path | Sequence[str | Path]]


def prepare(
    name: str,
    *,
    files: Files | None = None,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    bad_records: BadRecords | None = None,
    download: bool = False,
) -> dict[str, ReadReport]:
    """Write a preference set as ArrayRecord, for `tfds:NAME` and `tfds.data_source`.

    Args:
      name: `preference_files/ANY_NAME`, `hh_rlhf/harmless_base`, `ultrafeedback_binarized`,
        `tldr_comparisons`.
      files: your files by split; in place of the publisher's names.
      folder: folder with the files of the publisher, under their original names.
      data_dir: where TFDS keeps data; by default its own choice (TFDS_DATA_DIR).
      bad_records: "error" or "skip"; by default the builder's own.
      download: fetch missing files from the publisher. Off: nothing is fetched.

    Returns:
      What was read and skipped, by split.
    """
    import tensorflow_datasets as tfds

    dataset, _, variant = name.partition("/")
    try:
        cls: Any = tfds.builder_cls(dataset)
    except tfds.core.DatasetNotFoundError:
        raise UserError(f"tfds:{name}: there is no builder {dataset}") from None
    if not issubclass(cls, PreferenceBuilder):
        raise UserError(f"tfds:{name}: not one of jaxalign's builders; use tfds build")
    builder = cls(
        config=_config(cls, name, variant),
        data_dir=None if data_dir is None else str(Path(data_dir).expanduser()),
        files=None if files is None else {split: _names(names) for split, names in files.items()},
        bad_records=bad_records,
        download=download,
    )
    options = tfds.download.DownloadConfig(
        manual_dir=None if folder is None else str(Path(folder).absolute()),
        try_download_gcs=False,
    )
    builder.download_and_prepare(download_config=options)
    return builder.reports


def _config(cls: Any, name: str, variant: str) -> str | FilesConfig:
    """The variant's name, or a variant of the user's own."""
    known = [config.name for config in cls.BUILDER_CONFIGS]
    if variant in known:
        return variant
    if known == ["default"]:  # preference_files: any name is a variant
        return FilesConfig(name=variant) if variant else "default"
    if not variant and len(known) == 1:
        return known[0]
    raise UserError(f"tfds:{name}: the variants of {name.partition('/')[0]} are {', '.join(known)}")


def _names(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Absolute names of one or more files."""
    several = [paths] if isinstance(paths, str | Path) else paths
    return [str(Path(path).expanduser().absolute()) for path in several]
