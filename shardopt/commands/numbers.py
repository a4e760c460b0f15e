"""Types of arguments: numbers within bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least {least}")
        return int(text)

    return number


def between(least: float, most: float, least_too: bool = True) -> Callable[[str], float]:
    """The type of a number from `least` (or above it) to `most`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (value == least and not least_too):
            words = "from" if least_too else "above"
            raise argparse.ArgumentTypeError(f"{text!r}: write a number {words} {least:g} to {most:g}")
        return value

    return number
