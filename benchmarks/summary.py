"""``python -m benchmarks.summary FILE...``: the rows of some files, one short line for each case."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from benchmarks.harness import Row


def line(case: str, rows: list[Row]) -> str:
    ours, of_floor = rows[0]["ours_ms"], rows[0]["of_floor"]
    if ours is None or of_floor is None:
        return f"{case:<56} FAILED: wrong result"
    ratios = ", ".join(f"{row['ratio']:.1f}x {row['peer']}" for row in rows if row["ratio"])
    return f"{case:<56} {ours:8.4g} ms {100 * of_floor:4.0f} % of floor  {ratios}"


def main(files: list[str]) -> None:
    for file in files:
        rows: list[Row] = json.loads(Path(file).read_text())
        if "ours_ms" not in rows[0]:  # ceilings, which are nobody's
            continue
        print(f"{Path(file).stem}: {rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}")
        for case, group in groupby(rows, key=lambda row: row["case"]):
            print(line(case, list(group)))


if __name__ == "__main__":
    main(sys.argv[1:])
