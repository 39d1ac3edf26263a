"""Beginnings of stories, as prompts: `python -m experiments.data_collection.prompts FOLDER`."""

import itertools
import json
import sys
from pathlib import Path

NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Mia", "Tim", "Anna", "Jack", "Lucy", "Bob", "Kate")
PLACES = ("park", "garden", "house", "forest", "school", "shop", "farm", "zoo")
THINGS = ("ball", "dog", "hat", "cake", "book", "box")


def main(folder: str) -> None:
    """Write train.jsonl (432 beginnings) and held_out.jsonl (144): no name is in both."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for file, names in (("train", NAMES[:9]), ("held_out", NAMES[9:])):
        rows = [
            {"prompt": f"One day, {name} went to the {place} with a {thing}."}
            for name, place, thing in itertools.product(names, PLACES, THINGS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{file}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
