"""Which stage's turn it is: those whose predecessors are done."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


class Agenda:
    """The stages that wait, run and are done.

    Args:
        order: every stage, as DVC would run one after the other.
        needs: stage to the stages that it reads of, all of them in ``order``.
        ended: those that need not run.
    """

    def __init__(
        self, order: Sequence[str], needs: Mapping[str, frozenset[str]], ended: Collection[str] = ()
    ) -> None:
        self._waiting = [name for name in order if name not in ended]
        self._needs = {name: set(needs.get(name, ())).difference(ended) for name in order}
        self._running: set[str] = set()

    def next(self) -> str | None:
        """The first stage that can start, which is running from now on; None where none can."""
        for name in self._waiting:
            if not self._needs[name]:
                self._waiting.remove(name)
                self._running.add(name)
                return name
        return None

    def done(self, name: str) -> None:
        """A running stage has ended well: those that read of it have one less to wait for."""
        self._running.remove(name)
        for needs in self._needs.values():
            needs.discard(name)

    def failed(self, name: str) -> list[str]:
        """A running stage has failed; the stages that cannot run any more, in order."""
        self._running.remove(name)
        lost = {name}
        dropped = []
        for other in self._waiting:  # a stage stands behind all that it reads of
            if self._needs[other] & lost:
                lost.add(other)
                dropped.append(other)
        self._waiting = [other for other in self._waiting if other not in lost]
        return dropped

    @property
    def over(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self._running
