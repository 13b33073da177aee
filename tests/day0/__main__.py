"""`python -m tests.day0` (`make day0`): every architecture of the installed transformers, and what changed since coverage.json."""

import argparse
import logging
import os
import sys

import transformers

from tests.day0.coverage import LEAST, changes, count, load, save, summary
from tests.day0.draws import draws
from tests.day0.sweep import Outcome, sweep
from tests.day0.zoo import types

KINDS = ("causal", "vlm")
QUICK = ("parity", "checkpointing", "revert", "packed rows")


def main() -> int:
    """Run, print, and say by the exit code whether anything is wrong (1) or less is served than promised (1)."""
    parser = argparse.ArgumentParser(prog="python -m tests.day0", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--checks", default="quick", help="quick, all, or names separated by commas")
    parser.add_argument(
        "--draws", type=int, default=0, metavar="N", help="N random training steps instead of the sweep"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random training steps")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 2, 8))
    parser.add_argument("--write", action="store_true", help="write coverage.json and docs/coverage.md")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    return _draws(arguments) if arguments.draws else _sweep(arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    found: list[Outcome] = []
    for outcome in sweep(KINDS, _checks(arguments.checks), arguments.names, arguments.processes):
        found.append(outcome)
        state = "WRONG" if outcome.wrong else "not built" if outcome.unbuildable else "right"
        _say(f"{len(found):4d} {outcome.kind}/{outcome.name}: {state} {outcome.calls} {outcome.wrong or ''}")
    if arguments.write:
        save(found)
    version, before = load()
    before = [outcome for outcome in before if not arguments.names or outcome.name in arguments.names]
    _say(f"\ntransformers {transformers.__version__}\n\n{summary(found)}\n\nSince transformers {version}:")
    for change in changes(before, found):
        _say(f"  {change}")
    short = [] if arguments.names else [what for what in LEAST if _is_short(found, what)]
    _say(f"less than promised: {', '.join(short)}" if short else "")
    return 1 if short or any(outcome.wrong for outcome in found) else 0


def _draws(arguments: argparse.Namespace) -> int:
    known = {(outcome.kind, outcome.name) for outcome in load()[1] if outcome.unbuildable is None}
    chosen = [type for kind in KINDS for type in types(kind) if (type.kind, type.name) in known]
    wrong = skipped = 0
    for number, draw in enumerate(draws(chosen, arguments.draws, arguments.seed, arguments.processes), 1):
        wrong, skipped = wrong + (draw.wrong is not None), skipped + (draw.not_applicable is not None)
        if draw.wrong is not None:
            _say(f"WRONG {draw}: {draw.wrong}")
        if number % 50 == 0:
            _say(f"{number} draws, {wrong} wrong, {skipped} that vanilla does not take")
    return 1 if wrong else 0


def _checks(names: str) -> tuple[str, ...]:
    return (
        QUICK if names == "quick" else (*QUICK, "bfloat16", "compiled") if names == "all" else tuple(names.split(","))
    )


def _is_short(found: list[Outcome], what: str) -> bool:
    return any(count(found, kind, what) < least for kind, least in zip(KINDS, LEAST[what], strict=True))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
