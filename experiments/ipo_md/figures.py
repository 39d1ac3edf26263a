"""Figures of the tabular study: ways on the simplex, and divergences over steps."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from experiments.ipo_md.methods import (
    BATCH,
    HARD,
    METHODS,
    SAMPLED_STEPS,
    UNIFORM,
    WORLDS,
    World,
    run,
    sampled,
    with_adam,
)
from jaxalign.games import (
    GAMES,
    contrastive,
    divergence,
    equilibrium,
    game,
    learn,
    mirror_descent,
    mixture,
    self_play,
)
from jaxalign.games.mirror_descent import munos_steps
from jaxalign.losses import ipo


def corner(policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of policies of three actions in an equilateral triangle."""
    return policies[..., 1] + policies[..., 2] / 2, policies[..., 2] * np.sqrt(3) / 2


def plot_simplex(path: Path) -> None:
    """Ways of IPO-MD for several beta, of their mixtures, and Adam's orbit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained")
    close = [axis.inset_axes((0.62, 0.52, 0.42, 0.42)) for axis in axes[:2]]
    world = World(name="near-cyclic", preferences=GAMES["skewed_cycle"], reference=UNIFORM, tau=0.1)
    starts = np.array([[0.05, 0.05, 0.9], [0.9, 0.05, 0.05], [0.05, 0.9, 0.05]])
    for beta, colour in ((0.0, "#4c72b0"), (0.125, "#dd8452"), (0.25, "#55a868"), (0.5, "#c44e52")):
        target = equilibrium(world.preferences, world.reference, world.tau, beta=beta)
        tighter = equilibrium(world.preferences, world.reference, world.tau / (1 - beta))
        for number, start in enumerate(starts):
            policies = np.asarray(
                learn(
                    contrastive(ipo, self_play(first=beta), tau=world.tau),
                    game(world.preferences, world.reference),
                    optax.sgd(0.05 * world.tau),
                    steps=4000,
                    every=10,
                    start=jnp.log(jnp.asarray(start)),
                )
            )
            mixed = np.stack([mixture(p, world.reference, beta) for p in policies])
            label = f"β = {beta:g}" if number == 0 else None
            for view in (axes[:2], close):
                for axis, way in zip(view, (policies, mixed), strict=True):
                    axis.plot(*corner(way), color=colour, linewidth=1.1, label=label)
        for axis, end in zip(close, (target, tighter), strict=True):
            axis.plot(
                *corner(end),
                "*",
                color=colour,
                markersize=9,
                markeredgecolor="black",
                markeredgewidth=0.6,
            )
    x, y = corner(world.nash)
    for axis, inset in zip(axes[:2], close, strict=True):
        inset.plot(*corner(world.reference), "k.")
        inset.set(xlim=(x - 0.11, x + 0.11), ylim=(y - 0.08, y + 0.08), xticks=[], yticks=[])
        axis.indicate_inset_zoom(inset)
    ways = {
        "Adam, first moment 0.9": (with_adam(HARD, 0.01, 0.9, every=5), "#c44e52"),
        "Adam without first moment": (with_adam(HARD, 0.01, 0.0, every=5), "#55a868"),
        "gradient descent": (run(METHODS["online IPO"], HARD, every=5), "#4c72b0"),
    }
    for label, (way, colour) in ways.items():
        axes[2].plot(*corner(way), color=colour, linewidth=0.9, label=label)
    axes[2].plot(*corner(HARD.nash), "k*", markersize=12)
    titles = (
        "IPO-MD's policies (stars: π*_β, dot: π_ref)",
        "their mixtures with π_ref (stars: equilibria at τ / (1 − β))",
        "online IPO on rock, paper, scissors, τ = 0.05",
    )
    for axis, title, names in zip(
        axes, titles, ("abc", "abc", ("rock", "paper", "scissors")), strict=True
    ):
        corners = corner(np.eye(3)[[0, 1, 2, 0]])
        axis.plot(*corners, color="grey", linewidth=0.8)
        for name, x, y in zip(names, (0, 1, 0.5), (-0.04, -0.04, 0.91), strict=True):
            axis.text(x, y, name, ha="center", va="center")
        axis.set_title(title, fontsize=10, pad=14)
        axis.set_aspect("equal")
        axis.axis("off")
    axes[0].legend(fontsize=8, loc="upper left", frameon=False)
    axes[2].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.05, 1.0), frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def plot_divergence(path: Path) -> None:
    """Divergence from the equilibrium over steps: exact, mirror descent, from samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    world = WORLDS[0]

    def away(target, policies):
        return np.maximum([divergence(target, p) for p in policies], 1e-16)

    for name, style in (
        ("online IPO", "-"),
        ("self-play policy gradient", ":"),
        ("IPO-MD, β = 1/8", "-"),
        ("Nash-MD-PG, β = 1/8", ":"),
        ("offline IPO", "-"),
        ("online DPO", "-"),
        ("online SLiC", "-"),
        ("policy gradient on a fitted reward", "-"),
    ):
        policies = run(METHODS[name], world, steps=2000, every=5)
        axes[0].semilogy(
            np.arange(0, 2001, 5),
            away(world.nash, policies),
            style,
            linewidth=2.4 if style == ":" else 1.3,
            label=name,
        )
    axes[0].set_title(f"exact gradients, {world.name}, τ = {world.tau:g}", fontsize=10)

    tau, steps = 0.02, 4000
    hard = replace(HARD, tau=tau)
    for label, size, opponent in (
        ("Nash-MD, η = 2 / (τ (t + 2))", munos_steps(tau), "mixture"),
        ("Nash-MD, η = 0.5", 0.5, "mixture"),
        ("mirror descent, η = 0.5", 0.5, "policy"),
        ("extragradient, η = 0.5", 0.5, "half_step"),
    ):
        iterates = mirror_descent(
            hard.preferences, hard.reference, tau, steps=steps, step_size=size, opponent=opponent
        )
        axes[1].loglog(
            np.arange(1, steps + 1), away(hard.nash, iterates[1:]), linewidth=1.2, label=label
        )
    t = np.arange(1, steps + 1)
    axes[1].loglog(t, 8 / (tau**2 * (t + 1)), "k--", linewidth=1, label="bound 8 / (τ² (T + 1))")
    axes[1].set_title("closed-form steps, rock, paper, scissors, τ = 0.02", fontsize=10)

    for name, colour in (
        ("online IPO", "#4c72b0"),
        ("IPO-MD, β = 1/8", "#dd8452"),
        ("Nash-MD-PG, β = 1/8", "#55a868"),
    ):
        target = METHODS[name].target
        assert target is not None
        policies = sampled(METHODS[name], world, hard_labels=False, every=50)
        each = np.array([away(target(world), way) for way in policies])
        steps_seen = np.arange(0, SAMPLED_STEPS + 1, 50)
        low, middle, high = np.quantile(each, (0.25, 0.5, 0.75), axis=0)
        axes[2].semilogy(steps_seen, middle, color=colour, linewidth=1.4, label=name)
        axes[2].fill_between(steps_seen, low, high, color=colour, alpha=0.15, linewidth=0)
    axes[2].set_title(f"minibatches of {BATCH} pairs: KL to each one's own target", fontsize=10)
    for axis, label in zip(axes, ("step", "iteration", "step"), strict=True):
        axis.set(xlabel=label, ylabel="KL (nats)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    plt.close(figure)
