"""Make the training and held-out text of the base model from the folder of real text.

Command:  python -m experiments.base_lm.prepare ../shared/data runs/base_lm_text
Time:     under a minute
Expect:   train.jsonl (about 53M characters) and held_out_*.jsonl, no document in both

The instruction data take the transcript form of the preference sets ("Human:", "Assistant:"), so
that the model has seen a dialogue before it is aligned. The labelled reviews are left out: the
preference sets are built from them.
"""

import argparse
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

BOOKS, REVIEWS = 20_000_000, 15_000_000  # characters to train on
HELD_OUT = 200_000  # characters of each held-out text


def lines(path: Path) -> Iterator[dict]:
    """The values of a JSON Lines file, packed or not."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def clean(text: str) -> str:
    """Unix line ends, no HTML line breaks, no space at the ends."""
    return text.replace("\r\n", "\n").replace("<br />", "\n").strip()


def books(data: Path) -> Iterator[str]:
    """Whole books, in an order that their titles decide."""
    rows = list(lines(data / "text" / "books_core.jsonl.xz"))
    for row in sorted(rows, key=lambda row: fraction(row["path"])):
        yield clean(row["text"])


def reviews(data: Path) -> Iterator[str]:
    """Unlabelled film reviews."""
    for row in lines(data / "imdb" / "unsup.jsonl.xz"):
        yield clean(row["text"])


def stories(data: Path) -> list[str]:
    """Short stories, one document each."""
    text = (data / "text" / "tinystories" / "tinystories_2MB.txt").read_text(encoding="utf-8")
    whole = text.split("<|endoftext|>")[:-1]  # the last one is cut off
    return [clean(story) for story in whole if story.strip()]


def dialogues(data: Path) -> Iterator[str]:
    """Instructions and answers as transcripts."""
    for name in ("flan_cot", "gpteacher_roleplay", "alpaca_en_demo", "gsm8k_train", "rasbt"):
        for row in lines(data / "sft" / f"sft_{name}.jsonl"):
            yield f"\n\nHuman: {clean(row['prompt'])}\n\nAssistant: {clean(row['response'])}"


def until(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts up to a number of characters; the last one is cut."""
    left = characters
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def main() -> None:
    """Write the files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with text/, imdb/ and sft/")
    parser.add_argument("folder", type=Path, help="where the files are written")
    arguments = parser.parse_args()
    data, folder = arguments.data, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    all_books, all_reviews, all_stories = books(data), reviews(data), stories(data)
    wiki = (data / "text" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    wiki_test = (data / "text" / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    number = len(all_stories) // 10
    # generators go on where the held-out part ended: no document is in both
    files = {
        "held_out_books": list(until(all_books, HELD_OUT)),
        "held_out_reviews": list(until(all_reviews, HELD_OUT)),
        "held_out_stories": list(until(all_stories[:number], HELD_OUT)),
        "held_out_wikipedia": list(until([wiki_test], HELD_OUT)),
        "train": [
            *until(all_books, BOOKS),
            *until(all_reviews, REVIEWS),
            *all_stories[number:],
            wiki,
            *dialogues(data),
        ],
    }
    for name, texts in files.items():
        path = folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for text in texts:
                if text.strip():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}  {sum(map(len, texts)):>10,} characters  sha256 {digest[:16]}")


if __name__ == "__main__":
    main()
