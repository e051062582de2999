"""Images that do not decode: a few are left out and said, more are an error."""

import os
from typing import Sized

from vitopt.errors import InputError


class Undecodable(InputError):
    """An image that does not decode."""

    def __init__(self, problem: str, path: str = "", reason: str = ""):  # a DataLoader raises it again from its text
        super().__init__(problem)
        self.path, self.reason = path, reason


class LeftOut:
    """The images of a part that do not decode, path: reason, as workers and processes come upon them."""

    def __init__(self, part: Sized):
        self.part, self.found, self.said = part, {}, 0

    def add(self, lost: dict[str, str]) -> None:
        """Raise InputError where they are more than can be tolerated."""
        self.found |= lost
        if len(self.found) > tolerated(self.part):
            raise InputError(f"data: {self._description()}, which is more than 1 %: mend or remove them")

    def say(self) -> None:
        """Print one line on the main process, where there are more than at the last time."""
        if len(self.found) > self.said and int(os.environ.get("RANK", 0)) == 0:
            print(f"  left out: {self._description()}", flush=True)
        self.said = len(self.found)

    def _description(self) -> str:
        paths = sorted(self.found)
        more = ", …" if len(paths) > 3 else ""
        return (f"{len(paths):,} of the {len(self.part):,} {self.part.name} images do not decode: "
                f"{', '.join(paths[:3])}{more} ({self.found[paths[0]]})")


def tolerated(part: Sized) -> int:
    """How many images of a part may be left out: one in a hundred."""
    return len(part) // 100
