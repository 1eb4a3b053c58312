"""Runs every bench and writes build/bench.json: a list of {name, value, unit, floor, ratio, goal, better}.

A bench is a function ``bench_*`` in a file ``bench_*.py`` beside this one that returns a list of ``harness.Result``.
Arguments are words that a bench's name must contain. ``--strict`` makes a missed goal exit 1. MEMCONSOLE_BENCH_SIZE
(``256M``) lets hosts with little memory run smaller spans.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from harness import BUILD, Result, Skip

HERE = Path(__file__).parent


def run(words: list[str]) -> list[Result]:
    """The results of every bench whose name (``bench_extents.bench_scan``) contains one of the words, or of all."""
    results: list[Result] = []
    for path in sorted(HERE.glob("bench_*.py")):
        module = importlib.import_module(path.stem)
        for name in sorted(vars(module)):
            full = f"{path.stem}.{name}"
            if name.startswith("bench_") and (not words or any(word in full for word in words)):
                try:
                    made = getattr(module, name)()
                except Skip as why:
                    print(f"{full}: skipped: {why}", flush=True)
                    continue
                for result in made:
                    show(result)
                results += made
    return results


def show(result: Result) -> None:
    """One line of the table."""
    floor = f"{result.floor:10.3f}" if result.floor is not None else " " * 10
    ratio = f"{result.ratio:7.2f}" if result.ratio is not None else " " * 7
    sign = "<=" if result.better == "lower" else ">="
    goal = f"{sign} {result.goal:g}" if result.goal is not None else ""
    verdict = "" if result.goal is None else "met" if result.met else "MISSED"
    print(f"{result.name:58} {result.value:10.3f} {result.unit:6} {floor} {ratio}  {goal:10} {verdict}", flush=True)


def main() -> int:
    """Exit status 0, or 1 with ``--strict`` when a goal is missed."""
    parser = argparse.ArgumentParser(description="Run the benches and write build/bench.json.")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a goal is missed")
    parser.add_argument("words", nargs="*", help="only benches whose name contains one of these")
    options = parser.parse_args()
    print(f"{'bench':58} {'value':>10} {'unit':6} {'floor':>10} {'ratio':>7}  goal")
    results = run(options.words)
    BUILD.mkdir(exist_ok=True)
    listed = [{**dataclasses.asdict(result), "ratio": result.ratio} for result in results]
    (BUILD / "bench.json").write_text(json.dumps(listed, indent=1) + "\n")
    missed = [result.name for result in results if not result.met]
    if missed:
        print(f"{len(missed)} of {len(results)} goals missed: " + "; ".join(missed))
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
