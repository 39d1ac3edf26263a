"""Matrix products of given shapes in PyTorch, with nothing around them."""

import json
import resource
import statistics
import sys

import torch
from recorder import MARK


def main(job: dict) -> None:
    """CPU-seconds of each product, in turn, round by round."""
    arrays = [(torch.randn(m, inner), torch.randn(inner, n)) for m, inner, n in job["shapes"]]
    seconds = [[] for _ in arrays]
    for number in range(job["rounds"] + 1):
        for own, (a, b) in zip(seconds, arrays, strict=True):
            before = resource.getrusage(resource.RUSAGE_SELF)
            a @ b
            after = resource.getrusage(resource.RUSAGE_SELF)
            if number:
                own.append(sum(after[:2]) - sum(before[:2]))
    print(MARK + json.dumps({"cpu_seconds": [statistics.median(own) for own in seconds]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
