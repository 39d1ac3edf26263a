"""Training data from a simulated society: imitation, feedback, revisions, comparisons and pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxalign.collection.collecting import Collection
from jaxalign.collection.society import Encounter, Memory, Society, World
from jaxalign.collection.writing import open_files, write_row
from jaxalign.config import AtLeastOne, Range, Share
from jaxalign.data import preference_records
from jaxalign.data.records import transcript
from jaxalign.progress import track

FILES = ("imitation", "self_critic", "realignment")


@dataclass(frozen=True, kw_only=True)
class SimulatedSociety:
    """Let agents on a grid answer, rate and revise (arXiv:2305.16960)."""

    observer: str | None = None
    """Model that rates answers; None: the model that writes."""
    side: Annotated[int, Range("[2, inf)")] = 3
    """Side length of the grid of agents."""
    rounds: AtLeastOne = 2
    """Number of rounds; each agent answers one question in each."""
    neighbours: AtLeastOne = 4
    """Number of neighbours that give feedback on an answer."""
    dropout: Share = 0.0
    """Fraction of the neighbours that are replaced by agents from anywhere on the grid."""
    ratings: Literal["written", "scored"] = "written"
    """Source of ratings: the text that agents write, or their log-probs of each rating."""
    memories: str | None = None
    """File of preference pairs that agents remember; None: they remember nothing."""
    world: World = "all_good"
    """Responses that agents begin with: the good or the bad ones of --memories, or half of each."""
    each: AtLeastOne = 50
    """Number of memories of each agent."""

    def collect(self, collection: Collection) -> dict[str, Any]:
        """As in `Method`."""
        model = collection.model
        observer = model if self.observer is None else collection.open_model(self.observer)
        society = Society(
            backend=model,
            observer=observer,
            side=self.side,
            decoding=collection.decoding,
            neighbours=self.neighbours,
            dropout=self.dropout,
            ratings=self.ratings,
            seed=collection.decoding.seed,
        )
        if self.memories is not None:
            pairs = preference_records(self.memories, bad_records=collection.bad_records)
            memories = [
                Memory(
                    question=transcript(pair.prompt),
                    good=transcript(pair.chosen),
                    bad=transcript(pair.rejected),
                )
                for pair in pairs
            ]
            society.settle(memories, self.world, each=self.each)
        names: tuple[str, ...] = (
            "encounters",
            "feedback",
            "feedback_rated",
            "answers_rated",
            *FILES,
            "comparisons",
        )
        counts: dict[str, Any] = dict.fromkeys(names, 0)
        imitation: list[Any] = []
        encounters = society.rounds(collection.texts, self.rounds)
        with open_files(collection.folder, "encounters", *FILES, "comparisons") as files:
            for one in track(encounters, "encounters", self.rounds * self.side**2):
                counts["encounters"] += 1
                counts["feedback"] += len(one.feedback)
                counts["feedback_rated"] += sum(math.isfinite(x) for _, x, _ in one.feedback)
                ratings = one.draft_rating, one.revision_rating
                counts["answers_rated"] += sum(map(math.isfinite, ratings))
                feedback = [[a, x if math.isfinite(x) else None, b] for a, x, b in one.feedback]
                write_row(files["encounters"], {**vars(one), "feedback": feedback})
                data = society_data(one)
                imitation += data["imitation"]
                for name in FILES:
                    counts[name] += len(data[name])
                    for row in data[name]:
                        write_row(files[name], row)
                for row in data["pairs"]:
                    provenance = {
                        "way": "society",
                        "model": model.identity,
                        "observer": observer.identity,
                        "round": one.round,
                        "agent": one.agent,
                        "ratings": row["ratings"],
                    }
                    collection.pairs.write(
                        row["prompt"], row["chosen"], row["rejected"], provenance
                    )
            for row in comparison_data(imitation):
                counts["comparisons"] += 1
                write_row(files["comparisons"], row)
        return counts


def society_data(encounter: Encounter) -> dict[str, list[dict[str, Any]]]:
    """Training data from an encounter.

    Args:
      encounter: an encounter of `Society`.

    Returns:
      Rows by name. "imitation": both answers with the observer's ratings (of alignment only; the
      sandbox also rates engagement). "self_critic": the rated feedback on the draft, if there is a
      draft. "realignment": the revision, if it is rated above the draft and above 4. "pairs": draft
      and revision, the better one chosen, if their ratings differ.

    References:
      Liu et al. 2023, arXiv:2305.16960, section 3 and the released data.
    """
    one = encounter
    answers = [(one.draft, one.draft_rating), (one.revision, one.revision_rating)]
    rated = [(text, rating) for text, rating in answers if math.isfinite(rating) and text]
    data: dict[str, list[dict[str, Any]]] = {
        "imitation": [
            {"prompt": one.question, "response": text, "rating": rating} for text, rating in rated
        ],
        "self_critic": [
            {
                "prompt": f"{one.question}\n\nAnswer: {one.draft}\n\nFeedback:",
                "response": text,
                "rating": rating,
            }
            for _, rating, text in one.feedback
            if math.isfinite(rating) and one.draft
        ],
        "realignment": [],
        "pairs": [],
    }
    if len(rated) < 2 or rated[0][1] == rated[1][1]:
        return data
    if one.revision_rating > max(one.draft_rating, 4.0):
        feedback = "\n".join(text for _, _, text in one.feedback)
        prompt = f"{one.question}\n\nAnswer: {one.draft}\n\nFeedback: {feedback}\n\nRevision:"
        data["realignment"].append({"prompt": prompt, "response": one.revision})
    better, worse = sorted(rated, key=lambda row: -row[1])
    data["pairs"].append(
        {
            "prompt": one.question,
            "chosen": better[0],
            "rejected": worse[0],
            "ratings": [better[1], worse[1]],
        }
    )
    return data


def comparison_data(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All rated answers to each question, as the loss `stable_alignment_rated` reads them.

    Args:
      rows: the "imitation" rows of all encounters.

    Returns:
      Rows {prompt, responses, ratings}. Questions whose answers have fewer than two different
      ratings are left out.
    """
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], {}).setdefault(row["response"], row["rating"])
    return [
        {"prompt": prompt, "responses": list(rated), "ratings": list(rated.values())}
        for prompt, rated in groups.items()
        if len(set(rated.values())) > 1
    ]
