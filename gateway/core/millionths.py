"""Fractions from 0 to 1, exact to six decimals: an integer of millionths."""

MILLION = 1_000_000


class Millionths(int):
    def __str__(self) -> str:
        return f"{self / MILLION:.6f}".rstrip("0").rstrip(".")
