"""The retrieval task's CSV (`query_image, query_text, target_image`) and its folder of images."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data.errors import InputError, expect
from data.images import find_unreadable

COLUMNS = ("query_image", "query_text", "target_image")
IMAGE_COLUMNS = ("query_image", "target_image")


@dataclass(frozen=True)
class RetrievalSet:
    """Queries that can be scored, and what stood in the way of the others."""

    queries: pd.DataFrame  # COLUMNS, with images as paths ready to open; the index is the CSV row (header = 1)
    problems: tuple[InputError, ...]

    @property
    def database(self) -> pd.DataFrame:
        """The distinct target images, in order of appearance: the column `target_image`."""
        return self.queries[["target_image"]].drop_duplicates().reset_index(drop=True)

    @property
    def targets(self) -> list[int]:
        """The row of `database` that each query looks for."""
        return pd.factorize(self.queries["target_image"])[0].tolist()


def find_retrieval_set(folder: Path) -> tuple[Path, Path]:
    """The one CSV file in `folder`, and the folder its image names are relative to: `images/`, else `folder`."""
    expect(folder.is_dir(), folder, "a folder with one CSV file and images", "no such folder")
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv")
    expect(len(tables) == 1, folder, "one CSV file", ", ".join(p.name for p in tables) or "none")
    images = folder / "images"
    return tables[0], images if images.is_dir() else folder


def read_retrieval_set(folder: Path) -> RetrievalSet:
    """Read and check the set in `folder`. A row whose image is missing or unreadable becomes a problem.

    Windows line ends, a byte-order mark, spaces around column names and in file names, and repeated rows are
    fine. Errors: no or several CSV files, no text file, missing columns, no row that can be scored.
    """
    table, images = find_retrieval_set(folder)
    frame = _read_table(table)
    broken = _row_problems(frame, table, images)
    for column in IMAGE_COLUMNS:
        frame[column] = [str(images / name) for name in frame[column]]
    expect(len(broken) < len(frame), table, "at least one row that can be scored",
           next(iter(broken.values()), "no rows"))
    return RetrievalSet(frame.drop(index=list(broken)), tuple(broken.values()))


def _read_table(table: Path) -> pd.DataFrame:
    """The CSV's three columns as text; an empty cell is an empty text."""
    try:
        frame = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{table}: expected a CSV file in UTF-8, found {str(error).strip()}") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    expect(frame.columns.is_unique, f"{table} header", "each column once", ", ".join(frame.columns))
    expect(isinstance(frame.index, pd.RangeIndex), table, f"{len(frame.columns)} fields a row, as the header has",
           "more (is there a comma in a text without quotes?)")
    missing = [name for name in COLUMNS if name not in frame.columns]
    expect(not missing, f"{table} header", f"the columns {', '.join(COLUMNS)}", ", ".join(frame.columns))
    frame = frame[list(COLUMNS)].fillna("")  # a short row leaves NaN behind
    frame.index = pd.RangeIndex(2, len(frame) + 2)  # as a spreadsheet counts: the header is row 1
    return frame


def _row_problems(frame: pd.DataFrame, table: Path, images: Path) -> dict[int, InputError]:
    """The first thing wrong with each row that cannot be scored."""
    problems: dict[int, InputError] = {}
    names = pd.unique(frame[list(IMAGE_COLUMNS)].to_numpy().ravel())
    reasons = {name: reason for name in names if (reason := _name_problem(name, images))}
    found = find_unreadable(images / name for name in names if name not in reasons)
    for name in names:
        if (images / name) in found:
            reasons[name] = str(found[images / name]).removeprefix(f"{images / name}: ")
    for column in IMAGE_COLUMNS:
        for row, name in frame[column].items():
            if name in reasons:
                problems.setdefault(row, InputError(f"{table} row {row} '{column}' {name!r}: {reasons[name]}"))
    return dict(sorted(problems.items()))


def _name_problem(name: str, images: Path) -> str | None:
    if not name:
        return "expected an image name, found an empty cell"
    try:
        if not (images / name).resolve().is_relative_to(images.resolve()):
            return f"expected a name inside {images}, found a path that leads out of it"
        return None if (images / name).is_file() else f"expected a file in {images}, found none"
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or with a NUL
        return f"expected a file name, found {error}"
