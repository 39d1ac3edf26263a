"""Which method finds which policy in games whose equilibrium is known to the last digit.

Command:  python -m experiments.ipo_md.tabular
Time:     about two minutes on two cores
Expect:   the section "Equilibria" of this folder's README, simplex.png and divergence.png
"""

from pathlib import Path

import jax
import numpy as np

from experiments.ipo_md.figures import plot_divergence, plot_simplex
from experiments.ipo_md.methods import (
    BETA,
    HARD,
    METHODS,
    STEPS,
    WORLDS,
    World,
    run,
    sampled,
    with_adam,
)
from experiments.page import put, table
from jaxalign.games import divergence, equilibrium, mixture

FOLDER = Path(__file__).parent


def main() -> None:
    """Compute in float64, print, write the sections and the figures."""
    with jax.enable_x64(True):
        exact = found_exactly()
        samples = found_from_samples()
        print(exact, samples, sep="\n")
        plot_simplex(FOLDER / "simplex.png")
        plot_divergence(FOLDER / "divergence.png")
    put(FOLDER, "equilibria", exact)
    put(FOLDER, "samples", samples)


def number(x: float) -> str:
    """A divergence; what is rounding is not shown."""
    return "< 1e-12" if x < 1e-12 else f"{x:.1e}"


def settled(world: World, way: np.ndarray) -> str:
    """The last divergence from the equilibrium, or its range where the second half goes round."""
    away = [divergence(world.nash, policy) for policy in way[len(way) // 2 :]]
    if min(away) > 1e-9 and max(away) > 1.5 * min(away):
        return f"{min(away):.1e} to {max(away):.1e}"
    return number(away[-1])


def found_exactly() -> str:
    """The table of who finds what: divergences after exact gradient steps."""
    rows = []
    for name, method in METHODS.items():
        ways = [run(method, world, every=STEPS // 40) for world in WORLDS]
        lasts = [way[-1] for way in ways]
        away = [settled(world, way) for world, way in zip(WORLDS, ways, strict=True)]
        theory = "–"
        if method.target is not None:
            theory = number(
                max(
                    divergence(method.target(world), p)
                    for world, p in zip(WORLDS, lasts, strict=True)
                )
            )
        rows.append([name, *away, method.says, theory])
        if name.startswith("IPO-MD"):
            mixed = [
                mixture(p, world.reference, BETA) for world, p in zip(WORLDS, lasts, strict=True)
            ]
            tighter = [
                equilibrium(world.preferences, world.reference, world.tau / (1 - BETA))
                for world in WORLDS
            ]
            away = [number(divergence(w.nash, m)) for w, m in zip(WORLDS, mixed, strict=True)]
            theory = number(max(map(divergence, tighter, mixed)))
            rows.append(["its mixture with π_ref", *away, "equilibrium at τ / (1 − β)", theory])
    header = (
        "method",
        *(f"{world.name}, τ = {world.tau:g}: KL to the equilibrium" for world in WORLDS),
        "what theory says it finds",
        "largest KL to that",
    )
    return table(header, rows)


def found_from_samples() -> str:
    """Divergences from the target of theory after minibatches, over seeds; and what Adam does."""
    rows = []
    for name in ("online IPO", "IPO-MD, β = 1/8", "Nash-MD-PG, β = 1/8", "online DPO"):
        method = METHODS[name]
        for hard in (False, True):
            cells = []
            for world in WORLDS[:2]:
                target = world.nash if method.target is None else method.target(world)
                lasts = sampled(method, world, hard_labels=hard)[:, -1]
                away = np.array([divergence(target, policy) for policy in lasts])
                cells.append(f"{away.mean():.1e} (at most {away.max():.1e})")
            rows.append([name, "0 or 1" if hard else "probabilities", *cells])
    header = ("method", "labels", *(f"{w.name}, τ = {w.tau:g}" for w in WORLDS[:2]))
    text = table(header, rows)
    rows = []
    for b1 in (0.9, 0.0):
        cells = [
            number(divergence(HARD.nash, with_adam(HARD, rate, b1)[-1])) for rate in (0.01, 0.001)
        ]
        rows.append([f"Adam, first moment's decay {b1:g}", *cells])
    descent = run(METHODS["online IPO"], HARD)[-1]
    rows.append(["gradient descent", *[number(divergence(HARD.nash, descent))] * 2])
    return f"{text}\n{table(('optimiser', 'rate 0.01', 'rate 0.001'), rows)}"


if __name__ == "__main__":
    main()
