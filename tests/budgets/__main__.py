"""`python -m tests.budgets` measures every figure and says what changed; `--write` writes what got better."""

import argparse
import sys

from rich.console import Console

import tests.conftest  # noqa: F401  # the environment of the tests, before Triton is imported
from tests.budgets import ledger
from tests.budgets.groups import GROUPS, versions


def main() -> int:
    """Say what changed; the exit code is 1 where a figure got worse, or differs and was not written."""
    parser = argparse.ArgumentParser(prog="python -m tests.budgets", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the groups whose name holds this text")
    parser.add_argument("--write", action="store_true", help="write the figures; a group with a worse one is refused")
    parser.add_argument("--worse", metavar="WHY", help="write the worse ones too, and why")
    options = parser.parse_args()
    console, wrong = Console(highlight=False, markup=False, soft_wrap=True), False
    for name, group in GROUPS.items():
        if options.only not in name:
            continue
        found, of = group.measure(), versions(group)
        try:
            if options.write:
                change = ledger.write(name, found, of, options.worse)
            else:
                change = ledger.compare(ledger.committed(name, of) or {}, found)
                wrong |= bool(change)
        except ledger.WorseFigures as worse:
            change, wrong = str(worse), True
        console.print(f"{name}: {len(found)} figures, {change or 'as committed'}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
