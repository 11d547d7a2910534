"""Figures with bounds: what a scenario measured, and whether it is what it must be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles


@dataclass(frozen=True)
class Figure:
    """A measured value. `most` and `least` are its bounds; without them it is for information."""

    name: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def violation(self) -> str | None:
        """One sentence if the value is not within its bounds."""
        if self.most is not None and not self.value <= self.most:
            return f"{self.name}: {self._with_unit(self.value)}; expected at most {self._with_unit(self.most)}"
        if self.least is not None and not self.value >= self.least:
            return f"{self.name}: {self._with_unit(self.value)}; expected at least {self._with_unit(self.least)}"
        return None

    @property
    def bound(self) -> str:
        """The bounds as text, empty without any."""
        most = "" if self.most is None else f"≤ {_number(self.most)}"
        least = "" if self.least is None else f"≥ {_number(self.least)}"
        return f"{least} {most}".strip()

    def _with_unit(self, value: float) -> str:
        return f"{_number(value)} {self.unit}".strip()

    @property
    def measured(self) -> str:
        """Value and unit."""
        return self._with_unit(self.value)


def none_of(name: str, problems: Sequence[str]) -> Figure:
    """The number of problems, which must be 0; its name has the first one."""
    first = " ".join(problems[0].split())[:300] if problems else ""
    return Figure(f"{name} ({first})" if first else name, len(problems), most=0)


def percentile(values: Iterable[float], percent: int) -> float:
    """The percentile of one or more values."""
    listed = list(values)
    return quantiles(listed, n=100, method="inclusive")[percent - 1] if len(listed) > 1 else listed[0]


def table(results: Iterable[tuple[str, Sequence[Figure]]]) -> str:
    """The figures of scenarios as a Markdown table."""
    rows = ["| scenario | figure | measured | bound | |", "| --- | --- | ---: | ---: | --- |"]
    for scenario, figures in results:
        for figure in figures:
            verdict = "**violated**" if figure.violation else "holds" if figure.bound else ""
            rows.append(f"| {scenario} | {figure.name} | {figure.measured} | {figure.bound} | {verdict} |")
    return "\n".join(rows)


def _number(number: float) -> str:
    value = float(number)
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 100 else f"{value:.2f}"
