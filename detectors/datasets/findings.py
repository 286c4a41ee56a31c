"""What a check of a data set finds: errors, what is left out, what is worth knowing; like ones
counted together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cse_autoloss.trial import ConfigError

ERROR = "error"  # nothing trains until it is mended
LEFT_OUT = "left out"  # neither trained on nor measured
NOTE = "note"


@dataclass
class Finding:
    """One kind of thing in one file: the first case of it, and how many there are.

    Attributes:
        severity: ``error``, ``left out`` or ``note``.
        file: the annotation file or image; empty where the text names it.
        text: what it is, where (the first case) and what would be right.
        count: of cases.
    """

    severity: str
    file: str
    text: str
    count: int = 1

    def __str__(self) -> str:
        more = f" (and {self.count - 1:,} more like it)" if self.count > 1 else ""
        return f"{self.file}: {self.text}{more}" if self.file else f"{self.text}{more}"

    @property
    def line(self) -> str:
        """For a list of all."""
        return f"{self.severity}: {self}"


@dataclass
class Findings:
    """Collects; like cases, those of one kind in one file, are one :class:`Finding`."""

    _found: dict[tuple[str, str, str], Finding] = field(default_factory=dict)

    def add(self, severity: str, kind: str, file: Path | str, text: str) -> None:
        """One more case.

        Args:
            kind: cases of one kind are counted together.
            text: of this case; the first case's is kept.
        """
        key = (severity, kind, str(file))
        if key in self._found:
            self._found[key].count += 1
        else:
            self._found[key] = Finding(severity, str(file), " ".join(text.split()))

    def error(self, kind: str, file: Path | str, text: str) -> None:
        self.add(ERROR, kind, file, text)

    def left_out(self, kind: str, file: Path | str, text: str) -> None:
        self.add(LEFT_OUT, kind, file, text)

    def note(self, kind: str, file: Path | str, text: str) -> None:
        self.add(NOTE, kind, file, text)

    def __iter__(self) -> Iterator[Finding]:
        """Errors first, then what is left out, then notes."""
        for severity in (ERROR, LEFT_OUT, NOTE):
            yield from (found for found in self._found.values() if found.severity == severity)

    @property
    def errors(self) -> list[Finding]:
        return [found for found in self if found.severity == ERROR]

    def raise_first(self) -> None:
        """Raise the first error, in one line that tells of the others.

        Raises:
            ConfigError: if there is any error.
        """
        errors = self.errors
        if errors:
            others = len(errors) - 1
            more = f"; {others} more to mend: cse-search data check lists them" if others else ""
            raise ConfigError(f"{errors[0]}{more}")
