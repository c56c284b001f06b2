"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something about a capture that is valid but probably not what was intended."""

    code: str  # one word, which stays the same whatever the numbers are
    text: str  # what was found, with its evidence
    remedy: str  # what to do about it
    views: tuple[int, ...] = ()  # that it is about, where it is about some

    @property
    def sentence(self) -> str:
        """Both, for a log."""
        return f"{self.text}: {self.remedy}"


def counted(number: int, noun: str) -> str:
    """A number of things, as text."""
    return f"{number} {noun}" + "s" * (number != 1)
