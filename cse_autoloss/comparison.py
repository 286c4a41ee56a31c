"""Losses that the search did not find: those that are known, and who takes part in the
comparison."""

from __future__ import annotations

from collections.abc import Mapping

from cse_autoloss.config import Config
from cse_autoloss.expression import ExpressionError
from cse_autoloss.journal import DEFAULT, FOUND
from cse_autoloss.space import SearchSpace, load_space
from cse_autoloss.trial import ConfigError

RELEASED = "CSE-Autoloss"  # how the name begins of the known loss that was released with the paper


def compared(config: Config, spaces: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Who takes part in the comparison beside what was found: label to losses by branch. The
    default losses come first, then the released ones, if they are of the branches that are
    searched, then the run's ``others``.

    Raises:
        ConfigError: as :func:`read_others`.
    """
    searched = {branch: load_space(spaces[branch]) for branch in config.search.branches}
    names = load_space(spaces["cls"]).losses
    released = next((name for name in names if name.startswith(RELEASED)), None)
    entries: dict[str, dict[str, str]] = {DEFAULT: {}}
    if released and all(released in space.losses for space in searched.values()):
        entries[released] = {
            branch: str(space.losses[released].expression) for branch, space in searched.items()
        }
    return entries | read_others(config, spaces)


def read_others(config: Config, spaces: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The run's ``others``: label to losses by branch.

    Raises:
        ConfigError: for a name that stands for something else, text that is no loss, or a branch
            without a space.
    """
    entries: dict[str, dict[str, str]] = {}
    for label, losses in config.others.items():
        if label.startswith((DEFAULT, RELEASED, FOUND)):
            raise ConfigError(
                f"others.{label}: names that start with {DEFAULT}, {RELEASED} or {FOUND} stand for "
                "what takes part anyway; choose another"
            )
        entries[label] = {}
        for branch, text in losses.items():
            if branch not in spaces:
                raise ConfigError(
                    f"others.{label}.{branch}: this detector's {branch} loss cannot be another; "
                    f"the others can be: {', '.join(spaces)}"
                )
            try:
                entries[label][branch] = str(load_space(spaces[branch]).expression(text))
            except ExpressionError as error:
                raise ConfigError(f"others.{label}.{branch}: {error}") from None
    return entries


def known_candidates(spaces: Mapping[str, SearchSpace]) -> list[tuple[str, dict[str, str]]]:
    """Known losses, or pairs of them, as (name, losses): first those that were released together,
    then pairs of which each has, in both branches, the loss after its predecessor's, so that the
    first few have as many losses of each branch as there are pairs."""
    first, *rest = [
        [{branch: loss} for loss in space.losses.values()] for branch, space in spaces.items()
    ]
    pairs = first
    if rest:
        (others,) = rest
        pairs = [
            entry | others[(place + turn) % len(others)]
            for turn in range(len(others))
            for place, entry in enumerate(first)
        ]
    pairs.sort(key=lambda entry: len({loss.name for loss in entry.values()}))
    return [
        (
            " + ".join(dict.fromkeys(loss.name for loss in entry.values())),
            {branch: str(loss.expression) for branch, loss in entry.items()},
        )
        for entry in pairs
    ]
