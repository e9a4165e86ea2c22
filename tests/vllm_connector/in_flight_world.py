"""vLLM's own scheduler with steps in flight: which blocks each launched step reads and writes, and where loads go."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from scheduler_world import BLOCK, World

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Launched(NamedTuple):
    """A step that was scheduled, and with that launched."""

    step: int
    output: Any
    before: list[int]
    """Steps that were launched and not taken in then."""
    fresh: set[int]
    """Blocks that vLLM took from its pool for it."""

    @property
    def metadata(self) -> Any:
        return self.output.kv_connector_metadata


class InFlight:
    """Plays the engine: what is scheduled is launched at once, and taken in later, in order."""

    def __init__(self, world: World, drafts: int = 0) -> None:
        self.world = world
        self.scheduler = world.scheduler
        if drafts:
            self.scheduler.num_spec_tokens = self.scheduler.num_lookahead_tokens = drafts
        self.step = 0
        self.taken_in = 0
        self.flight: deque[Launched] = deque()
        self.writes: dict[int, set[int]] = {}
        self.reads: dict[int, set[int]] = {}
        self.last_writer: dict[int, int] = {}
        self._fresh: set[int] = set()
        take = world.pool.get_new_blocks

        def get_new_blocks(count: int) -> Any:
            blocks = take(count)
            self._fresh.update(block.block_id for block in blocks)
            return blocks

        world.pool.get_new_blocks = get_new_blocks

    def schedule(self) -> Launched:
        self._fresh = set()
        before = [each.step for each in self.flight]
        output = self.scheduler.schedule()
        self.step += 1
        writes, reads = set(), set()
        computed = _computed(output)
        for name in output.num_scheduled_tokens:
            table = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            # What is scheduled, and behind it what a drafter may write: the rest of the table.
            writes.update(table[computed[name] // BLOCK :])
            reads.update(table)
        self.writes[self.step], self.reads[self.step] = writes, reads
        self.last_writer |= dict.fromkeys(writes, self.step)
        launched = Launched(self.step, output, before, self._fresh)
        self.flight.append(launched)
        return launched

    def take_in(self, tokens: Mapping[str, list[int]] | None = None, report: Any = None, bad: Collection[int] = ()) -> int:
        """Take in the output of the oldest step in flight; its number. `tokens`: sampled, where not one that says nothing."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        launched = self.flight.popleft()
        names = list(launched.output.num_scheduled_tokens)
        sampling = self.sampling(launched)
        self.scheduler.update_from_output(
            launched.output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[(tokens or {}).get(name, [11]) if name in sampling else [] for name in names],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=None,
                kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=report, invalid_block_ids=set(bad)),
            ),
        )
        self.taken_in = launched.step
        for step in [each for each in self.writes if each < launched.step - 8]:
            del self.writes[step], self.reads[step]
        return launched.step

    def sampling(self, launched: Launched) -> list[str]:
        """Requests of a step that get a token from it."""
        computed, found = _computed(launched.output), []
        for name, count in launched.output.num_scheduled_tokens.items():
            request = self.scheduler.requests.get(name)
            if request is not None and not request.is_finished() and computed[name] + count >= request.num_tokens:
                found.append(name)
        return found


def _computed(output: Any) -> dict[str, int]:
    """Tokens that each request of a step had before it."""
    cached = output.scheduled_cached_reqs
    found = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    return found | dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
