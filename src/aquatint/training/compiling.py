"""How long it takes to compile blocks, said as soon as it is over: the first step with each shape of pictures waits for it."""

from __future__ import annotations

from collections.abc import Callable

from aquatint.planning.forecast import time_text

LEAST_SECONDS = 1.0  # shorter ones go unsaid


class CompileClock:
    """Looks every now and then whether blocks were compiled. Without `compiles` there is nothing to see."""

    def __init__(self, *, compiles: bool) -> None:
        self.compiles = compiles
        self.seconds = compile_seconds() if compiles else 0.0

    def look(self, note: Callable[[str], None]) -> None:
        """Says how long it took since the last look, if it took long."""
        before, self.seconds = self.seconds, compile_seconds() if self.compiles else 0.0
        if self.seconds - before >= LEAST_SECONDS:
            note(f"compiled blocks for a new shape of pictures, in {time_text(self.seconds - before)}")


def compile_seconds() -> float:
    """Of this process so far."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
