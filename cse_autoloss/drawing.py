"""Pictures of a loss: its tree, and its value and derivative beside those of the space's known
losses."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cse_autoloss.canonical import canonical, known_name
from cse_autoloss.errors import UserError
from cse_autoloss.expression import Expression
from cse_autoloss.files import write_whole
from cse_autoloss.losses import build_loss
from cse_autoloss.primitives import Primitive
from cse_autoloss.space import SearchSpace

POINTS = 241
CURVES = 6  # known losses that a loss is drawn beside: the first of the space


def text_tree(expression: Expression) -> str:
    """The tree, one node a line, children indented below their operator."""

    def node(primitive: Primitive, args: list[list[str]]) -> list[str]:
        lines = [primitive.name]
        for i, (first, *rest) in enumerate(args):
            last = i == len(args) - 1
            lines += [
                ("└─ " if last else "├─ ") + first,
                *(("   " if last else "│  ") + line for line in rest),
            ]
        return lines

    lines: list[str] = expression.fold(lambda name: [name], node)
    return "\n".join(lines)


@dataclass(frozen=True)
class Sweep:
    """A way through the inputs of a loss.

    Attributes:
        title: what is swept, and what is held.
        label: of the axis that is swept along.
        values: (K,) along that axis.
        losses: ``losses(expression) -> (K,)`` the loss at each of them, a graph on ``moved``.
        moved: (K,) what derivatives are by.
        slope: of the axis that they are drawn on.
    """

    title: str
    label: str
    values: Tensor
    losses: Callable[[Expression], Tensor]
    moved: Tensor
    slope: str

    def curve(self, expression: Expression) -> tuple[Tensor, Tensor]:
        """(K,) the loss and its derivative at each value."""
        losses = self.losses(expression)
        (slopes,) = torch.autograd.grad(losses.sum(), self.moved)
        return losses.detach(), slopes


def sweeps(space: SearchSpace) -> list[Sweep]:
    """What a loss of this space is drawn along.

    Two-stage: the label's logit, or another's, of five columns of which the others are 0, IoU 1;
    and the IoU from 0.3 on, below which hardly a positive's box lies, all logits 0. One-stage: the
    logit of a label with IoU 1, or of a negative, without alpha; and the IoU of a label with logit
    0. Boxes: a square of 100 pixels that slides off its target along the diagonal, by IoU.
    """
    if space.branch == "reg":
        overlaps = torch.linspace(0.005, 0.999, POINTS, dtype=torch.float64, requires_grad=True)

        def box_losses(expression: Expression) -> Tensor:
            shift = 100 - torch.sqrt(2e4 * overlaps / (1 + overlaps))
            pred = torch.stack([shift, shift, shift + 100, shift + 100], 1)
            target = torch.tensor([0.0, 0, 100, 100], dtype=torch.float64).expand_as(pred)
            return build_loss(expression, space, reduction="none")(pred, target)

        title = "a square of 100 px sliding off its target, diagonally"
        return [Sweep(title, "IoU", overlaps, box_losses, overlaps, "derivative by the IoU")]
    two_stage = space.inputs == "two_stage"
    columns = 5 if two_stage else 1
    options: dict[str, Any] = {} if two_stage else {"alpha": None}
    logits = torch.linspace(-8, 8, POINTS, dtype=torch.float64, requires_grad=True)
    ious = torch.linspace(0.3, 1, POINTS, dtype=torch.float64)
    undecided = torch.zeros(POINTS, dtype=torch.float64, requires_grad=True)

    def sweep(
        title: str, axis: str, label: int, moved: Tensor, pos_ious: Tensor | None = None
    ) -> Sweep:
        def losses(expression: Expression) -> Tensor:
            pred = torch.cat([moved[:, None], moved.new_zeros(POINTS, columns - 1)], 1)
            target = torch.full((POINTS,), label)
            loss = build_loss(expression, space, reduction="none", **options)
            return loss(pred, target, pos_ious=pos_ious).reshape(POINTS)

        values = moved if pos_ious is None else pos_ious
        return Sweep(title, axis, values, losses, moved, "derivative by the logit")

    if two_stage:
        return [
            sweep("a positive, IoU 1", "logit of its class", 0, logits),
            sweep("a positive, IoU 1", "logit of another class", 1, logits),
            sweep("a positive, all logits 0", "IoU of its box", 0, undecided, ious),
        ]
    return [
        sweep("an element that is its row's label, IoU 1", "logit", 0, logits),
        sweep("an element that is not", "logit", 1, logits),
        sweep("an element that is its row's label, logit 0", "IoU of its box", 0, undecided, ious),
    ]


def plot(expression: Expression, space: SearchSpace, path: Path) -> None:
    """Draw the loss's curves beside the known losses', and its tree, into a picture (.png, .svg or
    .pdf).

    Raises:
        UserError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure

    formula = canonical(expression, space)
    ways = sweeps(space)
    width, height, _, _ = _layout(formula)
    figure = Figure(
        figsize=(4.2 * len(ways) + max(4.0, 0.55 * width), max(6.0, 0.45 * height)),
        layout="constrained",
    )
    grid = figure.add_gridspec(
        2, len(ways) + 1, width_ratios=[4.2] * len(ways) + [max(4.0, 0.55 * width)]
    )
    own = known_name(expression, space)
    for column, way in enumerate(ways):
        upper, lower = (figure.add_subplot(grid[row, column]) for row in range(2))
        values = way.values.detach()
        for loss in islice(space.losses.values(), CURVES):
            if loss.name != own:
                for axes, line in zip((upper, lower), way.curve(loss.expression)):
                    axes.plot(values, line, linewidth=1, alpha=0.8, label=loss.name)
        for axes, line in zip((upper, lower), way.curve(formula)):
            axes.plot(values, line, color="black", linewidth=2.2, label=own or "this loss")
            axes.grid(alpha=0.3)
            axes.set_xlabel(way.label)
        upper.set_title(way.title, fontsize=10)
        upper.set_ylabel("loss" if column == 0 else "")
        lower.set_ylabel(way.slope if column == 0 else "")
        _limit(lower)
        if column == 0:
            upper.legend(fontsize=8)
    _draw_tree(figure.add_subplot(grid[:, -1]), formula)
    figure.suptitle(_title(formula, figure), fontsize=11)
    try:
        save(figure, path)
    except (OSError, UserError) as error:
        raise UserError(f"--plot {path}: {' '.join(str(error).split())}") from None


def save(figure: Any, path: Path, dpi: int = 130) -> None:
    """Write a figure into a file whose name says the format.

    Raises:
        UserError: if there is no such format.
        OSError: if the file cannot be written.
    """
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    write_whole(path, picture.getvalue())


def _limit(axes: Any) -> None:
    """Keep a derivative without bound (that of -log IoU at 0) from flattening all the others."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -12), min(high, 12))


def _title(formula: Expression, figure: Any) -> str:
    from matplotlib.mathtext import MathTextParser

    text = f"${formula.to_latex()}$"
    try:
        MathTextParser("path").parse(text)
    except ValueError:
        text = str(formula)
    return text if formula.size <= 60 else f"{formula.size} nodes"


def _layout(
    formula: Expression,
) -> tuple[int, int, list[tuple[float, float, str]], list[tuple[int, int]]]:
    """Width and height in nodes; (x, y, name) of each node; (parent, child) places of each edge."""
    points: list[tuple[float, float, str]] = []
    edges: list[tuple[int, int]] = []
    levels: list[
        tuple[int, list[int]]
    ] = []  # the operators above the current node: (place, children to come)
    column = 0
    for place, name in enumerate(formula.program):
        size = formula.subtree(place)
        leaves = sum(formula.subtree(p).stop == p + 1 for p in range(size.start, size.stop))
        while levels and formula.subtree(levels[-1][0]).stop <= place:
            levels.pop()
        points.append((column + (leaves - 1) / 2, -len(levels), name))
        if levels:
            edges.append((levels[-1][0], place))
        if leaves == 1 and size.stop == place + 1:
            column += 1
        else:
            levels.append((place, []))
    return column, formula.depth + 1, points, edges


def _draw_tree(axes: Any, formula: Expression) -> None:
    width, _, points, edges = _layout(formula)
    for parent, child in edges:
        axes.plot(*zip(points[parent][:2], points[child][:2]), color="0.6", linewidth=1, zorder=1)
    for place, (x, y, name) in enumerate(points):
        leaf = formula.subtree(place).stop == place + 1
        axes.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            fontsize=8,
            zorder=2,
            bbox={
                "boxstyle": "round",
                "facecolor": "#dbe9f6" if leaf else "white",
                "edgecolor": "0.5",
            },
        )
    axes.set_xlim(-1, max(width, 1))
    axes.set_ylim(-formula.depth - 0.7, 0.7)
    axes.set_axis_off()
