"""What a person sees of a run: a live panel in a terminal, plain lines elsewhere, the table at the
end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cse_autoloss.journal import Journal
from cse_autoloss.status import STAGES, Compared, Status, read_status

PLAIN_EVERY = 15.0  # seconds between plain lines
GAIN = "test, over default"  # heads the column of gains with the same seed


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
def watching(journal: Journal, console: Console) -> Iterator[Callable[[Any], None]]:
    """Show a run while it goes on; yields the function that is to be called again and again."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            yield lambda running: live.update(panel(read_status(journal)))
        return
    last: dict[str, Any] = {"time": 0.0, "key": None}

    def print_line(running: Any) -> None:
        now = time.monotonic()
        if now - last["time"] < PLAIN_EVERY:
            return
        status = read_status(journal)
        line = plain_line(status)
        if line != last["key"]:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        last.update(time=now, key=line)

    yield print_line


def plain_line(status: Status) -> str:
    """One line for a log file."""
    parts = [f"[{status.phase}]"]
    for branch, counts in status.funnel.items():
        parts.append(f"{branch}: " + " > ".join(f"{counts[stage]:,} {stage}" for stage in STAGES))
    if status.trials[1]:
        parts.append(
            f"{status.simulated} simulated > {status.trials[0]}/{status.trials[1]} trained"
            + (f" ({status.failed} failed)" if status.failed else "")
        )
    if status.trials_per_hour:
        parts.append(f"{status.trials_per_hour:.0f} trials/h")
    if status.seconds_left:
        parts.append(f"{duration(status.seconds_left)} left")
    parts.append(_best(status))
    return "; ".join(parts)


def panel(status: Status) -> Group:
    """The live view: funnel, running trials, rate, best so far."""
    funnel = Table(title=f"{status.folder}: {status.phase}", title_justify="left")
    for column in ("branch", *STAGES):
        funnel.add_column(column, justify="left" if column == "branch" else "right")
    for branch, counts in status.funnel.items():
        funnel.add_row(branch, *(f"{counts[stage]:,}" for stage in STAGES))
    running = ", ".join(f"{key} ({duration(seconds)})" for key, seconds in status.running) or "none"
    rate = (
        f"{status.trials_per_hour:.0f} trials/h" if status.trials_per_hour else "no trial done yet"
    )
    left = f", {duration(status.seconds_left)} left" if status.seconds_left else ""
    head = funnel if status.funnel else Text(f"{status.folder}: {status.phase}")
    return Group(
        head,
        Text(
            f"simulated {status.simulated}   trained {status.trials[0]}/{status.trials[1]}   failed {status.failed}   "
            f"equivalent {status.equivalent}   {rate}{left}"
        ),
        Text(f"running: {running}"),
        Text(_best(status)),
    )


def _best(status: Status) -> str:
    default = (
        f"default {status.baseline['mAP']:.3f}" if status.baseline else "default not measured yet"
    )
    if not status.best:
        return f"mAP on val: {default}" + ("; nothing found yet" if status.trials[1] else "")
    return f"mAP on val: {default}, best {status.best['mAP']:.3f} (#{status.best['id']})"


def comparison_table(rows: Sequence[Compared]) -> Table:
    """The table at the end: mean mAP over seeds and its standard deviation."""
    seeds = max((len(row.val) for row in rows), default=0)
    table = Table(
        title=f"mAP, mean ± standard deviation over {seeds} fresh seed{'s' * (seeds != 1)}",
        title_justify="left",
    )
    table.add_column("losses")
    table.add_column("val", justify="right")
    table.add_column("test", justify="right")
    table.add_column(GAIN, justify="right")
    for row in rows:
        table.add_row(
            row.label,
            *(
                spread(split)
                if split
                else f"failed: {row.failures[0] if row.failures else 'running'}"
                for split in (row.val, row.test)
            ),
            spread(row.gain, "+"),
        )
    return table


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of more than one, standard deviation; empty of none. With ``sign`` "+", a positive
    mean has its sign."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{deviation}"
