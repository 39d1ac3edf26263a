"""Matrix products of given shapes in PyTorch, with nothing around them."""

import json
import resource
import statistics
import sys
from collections.abc import Callable

import torch
from recorder import MARK


def main(job: dict) -> None:
    """CPU-seconds of each product, in turn, round by round."""
    calls = [product(*described) for described in job["products"]]
    seconds = [[] for _ in calls]
    for number in range(job["rounds"] + 1):
        for own, call in zip(seconds, calls, strict=True):
            before = resource.getrusage(resource.RUSAGE_SELF)
            call()
            after = resource.getrusage(resource.RUSAGE_SELF)
            if number:
                own.append(sum(after[:2]) - sum(before[:2]))
    print(MARK + json.dumps({"cpu_seconds": [statistics.median(own) for own in seconds]}))


def product(dtype: str, sizes: list[int], form: str) -> Callable[[], torch.Tensor]:
    """A product of x [m, inner], W [inner, n] and dy [m, n]."""
    m, inner, n = sizes
    shapes = (m, inner), (inner, n), (m, n)
    x, kernel, dy = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    if form == "x W":
        return lambda: x @ kernel
    return (lambda: dy @ kernel.T) if form == "dy W'" else (lambda: x.T @ dy)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
