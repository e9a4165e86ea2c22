"""Which forward passes a load has to wait for before it writes into its blocks. A state machine without a clock."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vcache")


class StepRule:
    """Counts the steps that vLLM has launched and those whose output it has taken in.

    vLLM keeps blocks that were freed out of its pool until every launched step that may write them was taken in, so a load has
    to wait for none (decision 0008). Two exceptions. The drafter of the last step taken in may still write, which is over when
    the next step begins on the GPU. And vLLM may not do so (one step at a time, or an outer `kv_producer`), which its requests
    show: `last_sched_seq` stays 0. Then a load waits until its own step begins, that is, for all before it.
    """

    def __init__(self, zeroing: bool = False) -> None:
        """`zeroing`: vLLM fills new blocks with zeros, which nothing fences."""
        self.step = 0
        self.fenced = False
        """Freed blocks were seen to be kept back."""
        self._processed = 0
        self._zeroing = zeroing
        self._told: bool | None = None

    def scheduled(self, last_sched_seq: int | None) -> None:
        """Begin a step. `last_sched_seq`: of a request that was scheduled before; None when there is none."""
        self.step += 1
        if last_sched_seq is None or self.fenced or self._zeroing:
            return
        self.fenced = last_sched_seq > 0
        if self.fenced is not self._told:
            self._told = self.fenced
            logger.info(
                "vLLM keeps freed blocks back until they are idle: loads start at once"
                if self.fenced
                else "vLLM does not keep freed blocks back: loads wait for the steps before theirs"
            )

    def processed(self) -> None:
        """The output of a step was taken in."""
        self._processed += 1

    @property
    def after(self) -> int:
        """Step whose beginning on the GPU the loads of the current one must wait for."""
        return min(self._processed + 1, self.step) if self.fenced else self.step
