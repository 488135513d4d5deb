"""Writes what was measured into the README, some pages of docs and the bundled draft's card, from the files that hold
the numbers: python -m bench.report

A table, or a figure within a sentence, stands between `<!-- NAME -->` and `<!-- end -->`; `--check` changes nothing and
fails where one is stale.
`--plots` draws the figures too; `--configs FILE` prints instead the tiles that a GPU's run found, as the lines of
beagle_kernels/triton/configs.py. `--bars FILE` prints what a GPU's run gave of what it is asked for.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from bench.report import bars, calls, engines, gpu, paper, tables, targets, tiles
from bench.report.results import BUNDLED, ROOT

DOCS = ("performance.md", "paper.md", "targets.md")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in DOCS), BUNDLED / "README.md")
MEASURED = tables.TABLES | paper.TABLES | targets.TABLES | engines.TABLES | calls.TABLES | gpu.TABLES
"""What a page may name."""


def filled(page: str) -> str:
    """The page with every table, and every figure in a sentence, between its marks made anew."""

    def measured(match: re.Match) -> str:
        name, line = match.groups()
        if name not in MEASURED:
            raise ValueError(f"<!-- {name} --> names nothing measured; allowed: {', '.join(MEASURED)}")
        return f"<!-- {name} -->{line}{MEASURED[name]()}{line}<!-- end -->"

    return re.sub(r"<!-- (\w+) -->(\n?).*?<!-- end -->", measured, page, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """1 if --check finds a stale table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a table is stale")
    parser.add_argument("--plots", action="store_true", help="draw the figures too")
    parser.add_argument("--configs", type=Path, metavar="FILE", help="of bench.tuning, or of bench/gpu/check.sh")
    parser.add_argument("--bars", type=Path, metavar="FILE", help="of bench/gpu/check.sh, or of python -m bench --json")
    options = parser.parse_args(arguments)
    if options.bars:
        print(*bars.lines(json.loads(options.bars.read_text(encoding="utf-8"))), sep="\n")
        return 0
    if options.configs:
        found = json.loads(options.configs.read_text(encoding="utf-8"))
        print(tiles.lines_of(found if isinstance(found, list) else tiles.entries_of(found["steps"])))
        return 0
    if options.plots:
        from bench.report import plots  # not above: it needs matplotlib

        print(*(f"drawn: {path.relative_to(ROOT)}" for path in plots.main()), sep="\n")
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if options.check else 'written'}: {name}" for name in stale) or "up to date")
    return int(bool(stale) and options.check)
