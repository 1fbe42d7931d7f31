"""Plain-text tables for reports that print themselves."""

from collections.abc import Collection, Sequence

__all__ = ["table_lines"]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Header and rows with aligned columns; columns whose index is in ``right`` are right-aligned.

    >>> table_lines(("layer", "ms"), [("fc", "12")], {1})
    ['layer  ms', 'fc     12']
    """
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(_cells(line, widths, right)).rstrip() for line in lines]


def _cells(line: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    return [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
