"""What a person sees of a run: a live panel in a terminal, plain lines elsewhere, the table at the
end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cse_autoloss.intervals import mean_interval
from cse_autoloss.journal import FUNNEL, Journal
from cse_autoloss.status import Compared, Status, read_status
from cse_autoloss.text import printable

PLAIN_EVERY = 15.0  # seconds between plain lines
REFRESH = 1.0  # seconds between two looks of the live panel at the journal
GAIN = "test, over default"  # heads the column of gains with the same seed


class RunConsole(Console):
    """Where a run says how it stands. If that cannot be written, on a full disk, or to a pipe that
    nobody reads any more, the run goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):  # rich's; it has sent what follows nowhere
            super().on_broken_pipe()


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )


@contextmanager
def watching(journal: Journal, console: Console) -> Iterator[Callable[[], None]]:
    """Show a run while it goes on; yields the function that is to be called again and again."""
    last, said = float("-inf"), ["", ""]
    every = REFRESH if console.is_terminal else PLAIN_EVERY

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < every:
            return False
        last = now
        return True

    def print_line() -> None:
        if not due():
            return
        status = read_status(journal)
        for place, line in enumerate((printable(" ".join(status.story)), plain_line(status))):
            if line != said[place]:
                said[place] = line
                console.print(line, soft_wrap=True, highlight=False, markup=False)

    if not console.is_terminal:
        yield print_line
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        yield lambda: live.update(panel(read_status(journal))) if due() else None


def plain_line(status: Status) -> str:
    """One line for a log file."""
    parts = [f"[{status.phase}]"]
    for branch, counts in status.funnel.items():
        parts.append(f"{branch}: " + " > ".join(f"{counts[name]:,} {name}" for name in FUNNEL))
    if done := stage_counts(status.stages):
        parts.append(
            f"{done} of {status.trials[1]}" if status.phase == "searching" else f"trained: {done}"
        )
    if status.trials_per_hour:
        parts.append(f"{status.trials_per_hour:.0f} trials/h")
    if status.seconds_left:
        parts.append(f"{duration(status.seconds_left)} left")
    parts.append(_best(status))
    return printable("; ".join(parts))


def stage_counts(stages: Mapping[str, tuple[int, int]]) -> str:
    """``tiny 16 > full 9 (2 failed)``."""
    return " > ".join(
        f"{stage} {done}" + (f" ({failed} failed)" if failed else "")
        for stage, (done, failed) in stages.items()
    )


def panel(status: Status) -> Group:
    """The live view: what goes on and why, funnel, running trials, rate, best so far."""
    head = _text(f"{status.folder}: {status.phase}")
    funnel = Table(title=head, title_justify="left")
    for column in ("branch", *FUNNEL):
        funnel.add_column(column, justify="left" if column == "branch" else "right")
    for branch, counts in status.funnel.items():
        funnel.add_row(_text(branch), *(f"{counts[name]:,}" for name in FUNNEL))
    shown = [f"{key} ({duration(seconds)})" for key, seconds in status.running[:8]]
    more = [f"and {len(status.running) - 8} more"] if len(status.running) > 8 else []
    rate = (
        f"{status.trials_per_hour:.0f} trials/h" if status.trials_per_hour else "no rate known yet"
    )
    left = f", {duration(status.seconds_left)} left" if status.seconds_left else ""
    return Group(
        *map(_text, status.story),
        funnel if status.funnel else head,
        _text(
            f"trainings: {stage_counts(status.stages) or 'none'}   candidates waiting: "
            f"{status.waiting}   allowed: {status.trials[1]}   {rate}{left}"
        ),
        _text(f"running: {', '.join(shown + more) or 'none'}"),
        _text(_best(status)),
    )


def _text(line: str) -> Text:
    """Neither markup nor anything that a terminal would obey."""
    return Text(printable(line))


def _best(status: Status) -> str:
    default = (
        f"default {status.baseline['mAP']:.3f}" if status.baseline else "default not measured yet"
    )
    if not status.best:
        return f"mAP on val at {status.fitness}: {default}" + (
            "; nothing found yet" if status.trials[1] else ""
        )
    best = f"best {status.best['mAP']:.3f} (#{status.best['id']})"
    return f"mAP on val at {status.fitness}: {default}, {best}"


def comparison_table(rows: Sequence[Compared]) -> Table:
    """The table at the end: mean mAP over seeds and its 95% interval."""
    table = Table(title=f"mAP over fresh seeds: {SPREAD}", title_justify="left")
    table.add_column("losses")
    table.add_column("n", justify="right")
    table.add_column("val", justify="right")
    table.add_column("test", justify="right")
    table.add_column(GAIN, justify="right")
    for row in rows:
        table.add_row(_text(row.label), *comparison_cells(row))
    return table


def comparison_cells(row: Compared) -> tuple[str, str, str, str]:
    """n, val, test and the gain of a row, in words."""
    failed = f" ({len(row.failures)} failed)" if row.failures else ""
    return (
        f"{len(row.measured)}{failed}",
        spread(row.val) or ("" if row.test else "none yet"),
        spread(row.test),
        spread(row.gain, sign=True),
    )


#: What ``spread`` writes.
SPREAD = "mean ± half of the 95% interval (Student's t over n seeds; a failed training counts as 0)"


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean and, of more than one, its 95% interval; empty of none."""
    return mean_interval(values).text(sign=sign) if values else ""
