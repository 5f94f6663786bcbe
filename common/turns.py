"""Things that are compared take turns: each is prepared, then all run round after round beside a matrix product."""

import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from common.errors import InputError
from common.measuring import MemoryWatch
from common.peak import MatmulProbe, timed
from common.runtime import is_out_of_memory

logger = logging.getLogger(__name__)
OUT_OF_MEMORY = "out of memory"


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out; also where that has been put into a user's words already."""
    return is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__))


@dataclass(kw_only=True)
class Contender(ABC):
    """One of the things that are compared, and what is known of it so far.

    `seconds`: of the runs that count; `memory`: bytes at the peak, None where it cannot be told; `error` says
    why it is not timed.
    """

    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    error: str | None = None

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages call it."""

    @property
    @abstractmethod
    def settles(self) -> bool:
        """Whether its first run is unlike the others: it compiles."""

    @abstractmethod
    def run(self) -> Any:
        """Do once what is timed."""

    def held(self) -> int:
        """Bytes that count towards `memory` beside those that a run adds."""
        return 0

    def first_runs(self, device: torch.device, max_seconds: float, judge: Callable[[Any], str | None]) -> None:
        """Warm up, judge the result (what is wrong with it, or None), measure memory.

        A run beyond `max_seconds` is the one that counts.
        """

        def first() -> None:
            seconds, growth, result = self._watched(device)
            self.error = judge(result)
            if self.error is None and (self.settles or seconds < max_seconds):
                seconds, growth, _ = self._watched(device)
            if seconds >= max_seconds:
                self.seconds.append(seconds)
            self.memory = None if growth is None else self.held() + growth

        self._unless_out_of_memory(first)

    def repeat(self, device: torch.device, max_seconds: float) -> None:
        """Time one run more, unless those so far took `max_seconds` together."""

        def again() -> None:
            if sum(self.seconds) < max_seconds:
                self.seconds.append(timed(device, self.run)[0])

        self._unless_out_of_memory(again)

    def speeds(self, amount: int) -> tuple[float, float, float]:
        """Median, slowest and fastest of the runs, as so many a second of what a run does `amount` of."""
        return amount / statistics.median(self.seconds), amount / max(self.seconds), amount / min(self.seconds)

    def _watched(self, device: torch.device) -> tuple[float, int | None, Any]:
        with MemoryWatch(device) as watch:
            seconds, result = timed(device, self.run)
        return seconds, watch.growth, result

    def _unless_out_of_memory(self, action: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except (RuntimeError, MemoryError, InputError) as error:
            if not ran_out(error):
                raise
            self.error = OUT_OF_MEMORY
        if self.error is not None:
            self.seconds.clear()
            self.memory = None


def take_turns(
    contenders: Sequence[Contender],
    prepare: Callable[[Any], None],
    probe: MatmulProbe,
    bar: Any,
    *,
    repeats: int,
    max_seconds: float,
) -> None:
    """Prepare each, then take turns; each round begins with another, so that none always follows the same one.

    The matrix product is measured before, between and after the rounds.
    """
    bar.total = (bar.total or 0) + len(contenders) * (1 + repeats)
    for contender in contenders:
        bar.set_description(f"{contender.title}, first run")
        prepare(contender)
        bar.update()
        if contender.error is not None:
            logger.warning("%s: %s", contender.title, contender.error)
    for turn in range(repeats):
        probe.measure()
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            bar.set_description(contender.title)
            contender.repeat(probe.device, max_seconds)
            bar.update()
    probe.measure()
