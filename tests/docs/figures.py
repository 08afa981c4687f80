"""The figures in the documentation, and the fields of ``results.json`` that they come from.

A comment before a paragraph, list or table says where its figures are from::

    <!-- figures benchmarks/results/peers/results.json
    13 times = 2x4.100.4.fsdp2-full.sent_bytes / 2x4.100.4.mics@node.sent_bytes
    row DeepSpeed ZeRO-3 in MB = 4x2.100.{}.deepspeed-zero3.sent_bytes
    -->

Left of ``=`` is a figure as the text has it: a number with a unit, or a number such as ``4.3e-6``. Right of it is a
field, or the quotient of two; the figure must be the field's value rounded to as many digits. A ``row`` is a table's
row by its first cell; ``{}`` stands for the number in the head of each column.

Fields are paths into the file, with dots. A comparison's file is a list of launches; for these the path is
``SHAPE.RATE.MICRO_STEPS.SYSTEM`` and then ``sent_bytes`` (per node and step) or ``step_seconds``, both medians, with
``unshaped`` for links without a rate, or ``largest_loss_difference``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from benchmarks.comparison.measurements import BASELINE, Measurements, Setting
from tests.docs.pages import ROOT, without_blocks

SCALES = {
    "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "GB/s": 1e9, "MB/s": 1e6, "Mbit/s": 1.0, "Gbit/s": 1e3, "TFLOPS": 1.0,
    "us": 1e-6, "ms": 1e-3, "s": 1.0, "seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0,
    "%": 0.01, "per cent": 0.01, "times": 1.0, "x": 1.0,
}  # fmt: skip


_WORDS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|hundred"


_UNIT = "|".join(sorted(map(re.escape, SCALES), key=len, reverse=True))


_NUMBER = r"\d[\d,]*(?:\.\d+)?"


FIGURE = re.compile(
    rf"(?<![\w.@-])(?:{_NUMBER}|{_WORDS})(?:[ -]|\u00a0)?(?:{_UNIT})(?![\w/-])"
    r"|(?<![\w.])\d(?:\.\d+)?e-?\d+(?!\w)",
    flags=re.IGNORECASE,
)


_COMMENT = re.compile(r"<!-- figures (\S+)\n(.*?)-->\n(.*?)(?=\n\s*\n|\Z)", flags=re.DOTALL)


class WrongFigureError(AssertionError):
    """A figure that is not what its source says, or that has none."""


@dataclass(frozen=True)
class Claim:
    """A figure or a table's row, and where it is from.

    Attributes:
        text: The figure as the page has it, or the row's first cell.
        unit: The unit of a row's cells; None for a single figure.
        fields: One path, or dividend and divisor.
    """

    text: str
    unit: str | None
    fields: tuple[str, ...]


def check_page(text: str, *, exempt: frozenset[str] = frozenset()) -> int:
    """Check all figures of a page, and return how many were compared with a field.

    Args:
        text: The page.
        exempt: Figures that are no results.

    Raises:
        WrongFigureError: If a figure differs from its field, has none, or a comment names one that is not there.
    """
    prose = without_blocks(text)
    compared = 0
    for file, claims, block in _COMMENT.findall(prose):
        compared += sum(_check_claim(claim, file, block) for claim in _claims(claims))
        compared_texts = {claim.text for claim in _claims(claims)}
        _check_sources(block, known=compared_texts | exempt)
    _check_sources(_COMMENT.sub("", prose), known=exempt)
    return compared


def value_of(file: str, path: str) -> float:
    """The value of a field.

    Raises:
        WrongFigureError: If there is none.
    """
    found: Any = _results(file)
    for key in path.split("."):
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise WrongFigureError(f"{file} has no field {path!r}: no {key!r}") from None
    if not isinstance(found, int | float):
        raise WrongFigureError(f"{path!r} of {file} is no number")
    return float(found)


def _claims(text: str) -> Iterator[Claim]:
    for line in filter(None, map(str.strip, text.splitlines())):
        figure, equals, source = line.partition(" = ")
        if not equals:
            raise WrongFigureError(f"{line!r} is not FIGURE = FIELD")
        row = re.fullmatch(r"row (.+) in (\S+)", figure)
        fields = tuple(source.split(" / "))
        yield Claim(row[1], row[2], fields) if row else Claim(figure, None, fields)


def _check_claim(claim: Claim, file: str, block: str) -> int:
    if claim.unit is not None:
        return _check_row(claim, file, block)
    if claim.text not in FIGURE.findall(block):
        raise WrongFigureError(f"the text after the comment does not have the figure {claim.text!r}")
    number, unit = _split(claim.text)
    _compare(number, _quotient(file, claim.fields) / SCALES.get(unit, 1.0), what=claim.text)
    return 1


def _check_row(claim: Claim, file: str, block: str) -> int:
    assert claim.unit is not None
    table = [_cells(line) for line in block.splitlines() if line.startswith("|")]
    columns = [(re.findall(r"\d+", cell) or [""])[0] for cell in table[0]]
    rows = [row for row in table if row[0] == claim.text]
    if len(rows) != 1:
        raise WrongFigureError(f"the table after the comment has {len(rows)} rows {claim.text!r}")
    for column, cell in zip(columns[1:], rows[0][1:], strict=True):
        value = _quotient(file, tuple(field.replace("{}", column) for field in claim.fields))
        _compare(cell, value / SCALES[claim.unit], what=f"{claim.text}, column {column}")
    return len(columns) - 1


def _quotient(file: str, fields: tuple[str, ...]) -> float:
    value = value_of(file, fields[0])
    return value / value_of(file, fields[1]) if len(fields) == 2 else value


def _compare(number: str, value: float, *, what: str) -> None:
    """Raise unless ``number`` is ``value`` rounded to the digits that it has, the last of which may be a rounded 0."""
    plain = number.replace(",", "")
    if "e" in plain:
        rounded = f"{value:.{len(plain.partition('e')[0].partition('.')[2])}e}"
        same = float(rounded) == float(plain)
    else:
        digits = len(plain.partition(".")[2])
        same = f"{value:.{digits}f}" == plain
    if not same:
        raise WrongFigureError(f"{what}: the page says {number}, its source {value:.6g}")


def _split(figure: str) -> tuple[str, str]:
    found = re.fullmatch(rf"({_NUMBER})\s*({_UNIT})", figure)
    return (found[1], found[2]) if found else (figure, "")


def _check_sources(text: str, *, known: frozenset[str] | set[str]) -> None:
    without_rows = "\n".join(
        line for line in text.splitlines() if not (line.startswith("|") and _cells(line)[0] in known)
    )
    orphans = [figure for figure in FIGURE.findall(without_rows) if figure not in known]
    orphans += [cell for cell in _cells_in_units(text) if cell not in known]
    if orphans:
        raise WrongFigureError(
            f"{', '.join(map(repr, orphans))}: no field of a results.json; name one in a comment "
            "(tests/docs/figures.py) or exempt what is no result (tests/docs/test_figures.py)"
        )


def _cells_in_units(text: str) -> Iterator[str]:
    """Numbers in the rows of tables whose head names a unit, as their row's first cell and the number."""
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        head, _, *rows = [_cells(line) for line in table.splitlines()] + [[], []]
        if re.search(rf"(?<![\w.@-])(?:{_UNIT})(?![\w/-])", " ".join(head)):
            yield from (row[0] for row in rows if any(re.fullmatch(_NUMBER, cell) for cell in row[1:]))


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


@cache
def _results(file: str) -> Any:
    results = json.loads((ROOT / file).read_text())
    if isinstance(results, dict) and "launches" in results:
        return {**results, **_comparison(Measurements(results))}
    if isinstance(results, dict) and "curves" in results:
        return {**results, "largest_difference": _curve_differences(results["curves"])}
    if isinstance(results, dict) and "predicted" in results:
        return {**results, **_predictions(results)}
    if isinstance(results, list):
        return _by_system(results)
    return results


def _comparison(measurements: Measurements) -> dict[str, Any]:
    rates = {f"{rate:g}": rate for rate in measurements.facts["rates_mbit"]} | {"unshaped": None}
    differences = [
        difference
        for shape in measurements.shapes
        for system in measurements.systems(shape)
        for purpose in {launch["purpose"] for launch in measurements.launches}
        if system != BASELINE and (difference := measurements.loss_difference(system, shape, purpose)) is not None
    ]
    return {
        "largest_loss_difference": max(differences),
        **{
            shape: {
                rate: {
                    str(steps): {
                        system: _medians(measurements, system, Setting(shape=shape, rate_mbit=mbit, micro_steps=steps))
                        for system in measurements.systems(shape)
                    }
                    for steps in measurements.facts["micro_steps"]
                }
                for rate, mbit in rates.items()
            }
            for shape in measurements.shapes
        },
    }


def _medians(measurements: Measurements, system: str, setting: Setting) -> dict[str, float]:
    spreads = {
        "sent_bytes": measurements.step_bytes(system, setting),
        "step_seconds": measurements.step_seconds(system, setting),
    }
    return {name: spread.median for name, spread in spreads.items() if spread is not None}


def _curve_differences(curves: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """By precision: the largest difference of a loss from DDP's."""
    largest: dict[str, float] = {}
    for name, systems in curves.items():
        precision = name.split(", ")[1]
        for losses in systems.values():
            differences = (abs(one - other) for one, other in zip(losses, systems["DDP"], strict=True))
            largest[precision] = max(largest.get(precision, 0.0), *differences)
    return largest


def _predictions(results: dict[str, Any]) -> dict[str, float]:
    steps = results["measured"]["steps"]
    errors = [abs(seconds / steps[name] - 1) for name, seconds in results["predicted"].items()]
    return {"largest_error": max(errors), "rate_mbit": float(results["rate"].removesuffix("mbit"))}


def _by_system(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over rounds, by system: the later saves, the steps beside them, and loading, in seconds."""
    systems = {run["system"] for run in rounds}

    def of_all(system: str, name: str) -> float:
        return median(seconds for run in rounds if run["system"] == system for seconds in run[name])

    return {
        system: {
            "later_save_seconds": median(
                s for run in rounds if run["system"] == system for s in run["save_seconds"][1:]
            ),
            "step_seconds": median(s for run in rounds if run["system"] == system for s in run["step_seconds"]),
            "loading_seconds": of_all(system, "resume_seconds") - of_all(system, "start_seconds"),
        }
        for system in systems
    }
