"""A measured figure beside what was promised."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    what: str
    promised: str
    measured: str
    holds: bool


def verdict(row: Row) -> str:
    if row.promised == "-":
        return ""
    return "holds" if row.holds else "falls short"


def render(rows: list[Row]) -> str:
    lines = ["| what | promised | measured | |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.promised} | {row.measured} | {verdict(row)} |" for row in rows]
    return "\n".join(lines)
