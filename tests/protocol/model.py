"""The protocol by which slots are written, in executable form, and a checker that tries every order of its steps.

Two client processes write, a lender reads the headers for a manager that starts anew, a reader follows what the manager says.
Everything is one step per memory word: of a slot generation G, key K, signature N (namespace, or the writer's id while G is
odd) and payload P0 P1; of a slab the format H of its header, and in the gate page the fence word F and a word U per client,
"I write in this slab". One slot per slab, one slab per segment.

Memory is SC (each store lands at once), TSO (store buffers, in order; x86) or WEAK (stores to different words land in any
order, loads of one group happen in any order). "fence" waits until the own stores have landed; a message to another process is
sent with an empty buffer.

A `Model` is told by names what is done otherwise than it must be; told nothing, it is the specification. `cases.py` says in
which worlds it is tried, and which faults it must find.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

WORDS = ("G", "K", "N", "P0", "P1", "H", "F", "U1", "U2")
G, K, N, P0, P1, H, F = range(7)
SIZE = len(WORDS)
NAMESPACE, OLD = 9, 5
"""What signs a complete header; the key of the chunk that is there at the beginning (6 in the second segment)."""
CLIENTS = (1, 2)
IDLE = -1


class World(NamedTuple):
    """What may happen in a run."""

    memory: str = "SC"
    managers: int = 2
    """One more than manager restarts."""
    floors: tuple[int, ...] = (10, 20, 30)
    """Where each manager's generations start, by the clock."""
    puts: tuple[int, int] = (1, 1)
    reader: bool = False
    kill: bool = False
    """Client 1 may die anywhere. (The clients are alike.)"""
    close: bool = False
    """Client 1 may close in order, anywhere."""
    fail: bool = False
    """A copy of client 1 may raise."""
    stop: bool = False
    """Client 1 may be stopped for ever while it writes nothing."""
    lapse: bool = False
    """The manager may declare tickets void."""
    remount: bool = False
    """The lender may lose its session once; the manager stays."""
    relink: bool = False
    """Client 1 may connect to the lender's socket anew, once."""
    visitor: bool = False
    """A second thread of client 1 writes in another slot of the same slab, once."""
    formats: bool = False
    """Each grant formats the slab anew."""
    late: bool = False
    """Two segments whose numbers are swapped by the second manager, and clients that hear of it late."""
    ring: bool = False
    """Payloads are moved by copies that are queued before anybody has looked at the header: of a slot that turns out to be
    refused they write what lies there, and a reader has the payload before it looks at the header (decision 0009)."""
    settled: bool = False
    """The manager restarts only while no announcement is half written, and it counts as wrong that two write in one slot: shows
    what is wrong behind a fault in announcing."""


class Ticket(NamedTuple):
    slab: int
    generation: int
    key: int
    epoch: int
    fence: int
    format: int


class Client(NamedTuple):
    number: int
    left: int
    """Puts that it will still begin."""
    pc: int = IDLE
    """Where it stands in the write program."""
    ticket: Ticket | None = None
    segment: int = 0
    """Where its map of segments says that the ticket's slab is."""
    inside: bool = False
    """Counted as writing (between enter and leave)."""
    visitor: str = ""
    """The other thread: "", "inside", "done"."""
    session: int = 1
    map: int = 1
    """Epochs of its session and of its map of segments."""
    life: str = "alive"
    """Or "closed", "stopped", "dead" (killed or exited), "gone" (and the lender knows)."""
    relinked: bool = False
    kept: tuple[int, ...] = ()
    """Payload words of a refused slot, to be written again."""
    buffer: tuple[tuple[int, int], ...] = ()

    @property
    def writes(self) -> bool:
        return self.inside or self.visitor == "inside"


class Slab(NamedTuple):
    """What the manager knows of a slab and its slot."""

    state: str
    """"free", "granted", "resting" (until it is known that its writer is done), "visible"."""
    counter: int
    fence: int
    """F as of the mount."""
    wait: frozenset[int] = frozenset()
    """Clients that wrote there at the mount and have not been heard of since."""
    writer: int = 0
    generation: int = 0
    key: int = 0
    format: int = 0
    """0: as found at the mount."""


class Manager(NamedTuple):
    epoch: int
    mounted: bool
    slabs: tuple[Slab, ...]
    sessions: frozenset[int]
    remounted: bool = False


class Lender(NamedTuple):
    pc: int = 0
    """Where it stands in the mount program, 1-based; 0: nothing to do."""
    epoch: int = 0
    mounts: int = 1
    floor: int = 0
    """Where the generations of the latest manager that it heard of start."""
    seen: tuple[int | None, ...] = ()
    buffer: tuple[tuple[int, int], ...] = ()


class Reader(NamedTuple):
    slab: int
    key: int
    generation: int
    group: int = 0
    seen: tuple[int | None, ...] = ()
    payload: tuple[int | None, ...] = ()


def write_program(deviations: frozenset[str], formats: bool) -> list[str]:
    """What a writer does, on the CPU or (from "G?" to the last fence) on a GPU, one word after the other."""
    gate = ["enter", "fence", "F?"]
    formatting = ["H?", "H=format"] if formats else []
    announce = ["G=odd", "fence", "K=key", "N=writer", "fence"]
    payload = ["P0=key", "P1=key", "fence"]
    publish = ["G==odd", "K==key", "N==writer", "N=namespace", "fence", "G=even", "fence"]
    leave = ["leave"]
    if "U set after F is compared" in deviations:
        gate = ["F?", "enter", "fence"]
    if "no fence between U and F: writer" in deviations:
        gate.remove("fence")
    if "F not compared" in deviations:
        gate.remove("F?")
    if "no gate" in deviations:
        gate, leave = ["session?"], []
    if "identity before the odd generation" in deviations:
        announce = ["K=key", "N=writer", "fence", "G=odd", "fence"]
    if "no fence after the odd generation" in deviations:
        announce.remove("fence")
    if "no fence between the payload and the even generation" in deviations:
        payload.remove("fence")
        publish.remove("fence")
    if "even generation before the payload" in deviations:
        payload, publish = publish, payload
    if "U cleared when queued" in deviations:
        gate, leave = [*gate, *leave], []
    body = [*announce, *payload, *publish]
    if "slab formatted before the gate" in deviations:
        return [*formatting, *gate, "G?", *body, *leave, "put_end"]
    return [*gate, *formatting, "G?", *body, *leave, "put_end"]


KEEP = ["keep P0", "keep P1", "P0=kept", "P1=kept"]
"""What a copy that cannot be called off does in a refused slot, before the writer gives up."""
GIVE_UP = ["fence", "leave", "put_revoke"]
"""What follows when a word was not what it must be, or a copy raised."""


class Step(NamedTuple):
    text: str
    kind: str
    """"", "fault" (need never happen), "lost" (a mount overlooks a complete chunk), "wrong" (a reader took wrong bytes)."""
    memory: tuple[int, ...]
    manager: Manager
    agent: Client | Lender | Reader | str


class Moment(NamedTuple):
    """A step of a trace, and memory after it."""

    who: str
    text: str
    memory: tuple[int, ...]


class Verdict(NamedTuple):
    states: int
    wrong: str
    """How a reader gets wrong bytes, or ""."""
    stuck: str
    """What never works again, though only faults could still happen, or ""."""
    lost: str
    """Which complete chunk a mount overlooks, or ""."""
    trace: list[Moment]
    """The shortest way to the first of these."""

    def __str__(self) -> str:
        lines = [f"{self.wrong or self.stuck or self.lost or 'no fault'} ({self.states} states)"]
        for who, text, memory in self.trace:
            slabs = [memory[at : at + SIZE] for at in range(0, len(memory), SIZE)]
            shown = " | ".join(" ".join(f"{word}={value}" for word, value in zip(WORDS, slab, strict=True)) for slab in slabs)
            lines.append(f"  {who:8} {text:58} {shown}")
        return "\n".join(lines)


State = tuple[tuple[int, ...], Manager, Client, Client, Lender, "Reader | str"]


class Model:
    """All runs of one protocol in one world."""

    def __init__(self, world: World, *deviations: str) -> None:
        self.world = world
        self.deviations = frozenset(deviations)
        self.gate = "no gate" not in deviations
        self.segments = range(2 if world.late else 1)
        self.program = write_program(self.deviations, world.formats)
        self.refused = self.give_up = len(self.program)
        if world.ring:
            self.program += KEEP
            self.give_up = len(self.program)
        self.program += GIVE_UP
        self.raised = self.give_up + (2 if "U not cleared after an exception" in deviations else 0)
        self.read_words = [s * SIZE + F + w for s in self.segments for w in CLIENTS if self.gate]
        self.read_words += [s * SIZE + word for s in self.segments for word in (G, K, N)]
        self.mount_program = self.mount_steps()
        self.groups = ((P0, P1), (G, K, N), (G, K, N)) if world.ring else ((G, K, N), (P0, P1), (G, K, N))
        self.client, self.lender, self.reader = cache(self._client), cache(self._lender), cache(self._reader)
        self.wrong_bytes = cache(self._wrong_bytes)

    def deviates(self, *names: str) -> bool:
        return not self.deviations.isdisjoint(names)

    # -- memory --------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(memory: tuple[int, ...], agent: Client | Lender, address: int) -> int:
        return next((value for at, value in reversed(agent.buffer) if at == address), memory[address])

    def store(self, memory: tuple[int, ...], agent, address: int, value: int):
        """Memory and agent afterwards."""
        if self.world.memory == "SC":
            return replaced(memory, address, value), agent
        return memory, agent._replace(buffer=(*agent.buffer, (address, value)))

    def landings(self, memory: tuple[int, ...], manager: Manager, agent: Client | Lender) -> Iterator[Step]:
        seen: set[int] = set()
        for i, (address, value) in enumerate(agent.buffer):
            if address not in seen:
                rest = agent.buffer[:i] + agent.buffer[i + 1 :]
                text = f"its {name(address)}={value} lands"
                yield Step(text, "", replaced(memory, address, value), manager, agent._replace(buffer=rest))
            seen.add(address)
            if self.world.memory == "TSO":
                return

    # -- clients -------------------------------------------------------------------------------------------------------

    def _client(self, memory: tuple[int, ...], manager: Manager, me: Client) -> list[Step]:
        """What a client may do next, and what may be done to it."""
        world, steps = self.world, list(self.landings(memory, manager, me))

        def step(text: str, kind: str = "", *, memory=memory, manager=manager, **changes) -> None:
            steps.append(Step(text, kind, memory, manager, me._replace(**changes)))

        if me.life == "dead" and (not me.buffer or self.deviates("hang-up told before the last store has landed")):
            at = [s * SIZE + F + me.number for s in self.segments if self.gate]
            row = tuple(0 if i in at else value for i, value in enumerate(memory))
            over = forget_writer(manager, me.number)
            step("its sockets close: the lender clears its row", memory=row, manager=over, life="gone")
        if me.life not in ("alive", "closed"):
            return steps
        known = me.session == manager.epoch
        first, quiet = me.number == 1, me.pc == IDLE and not me.writes
        ready = quiet and not me.buffer
        if first and world.kill:
            step("is killed", "fault", manager=writer_lost(manager, me.number) if known else manager, life="dead", session=0)
        if first and world.stop and quiet and me.life == "alive":
            step("is stopped for ever", "fault", life="stopped")
        if first and world.relink and not me.relinked:
            after = self.store(memory, me, F + 1, 0)[0] if self.deviates("row tied to a connection") else memory
            step("connects to the lender anew", "fault", memory=after, relinked=True)
        if first and world.visitor and (me.visitor == "inside" or (not me.visitor and me.life == "alive")):
            self.visit(memory, manager, me, steps)
        if first and world.close and me.life == "alive":
            goodbye = ready or self.deviates("Goodbye amid a write")
            leaving = forget_writer if goodbye else writer_lost
            step(
                "closes, with Goodbye" if goodbye else "closes, without Goodbye",
                "fault",
                manager=leaving(manager, me.number) if known else manager,
                life="closed",
                session=0,
            )
        if me.life == "closed" and ready:
            step("exits", life="dead")
        if me.life == "alive" and not known and not me.buffer and (quiet or self.deviates("hello amid a write")):
            greeted = forget_writer(manager, me.number)
            greeted = greeted._replace(sessions=greeted.sessions | {me.number})
            knows = me.map if world.late else manager.epoch
            step(f"says hello to M{manager.epoch}", manager=greeted, session=manager.epoch, map=knows)
        if world.late and me.map != me.session and me.session and me.life == "alive":
            step(f"hears of the segments of M{me.session}", map=me.session)
        if me.pc != IDLE:
            self.write(memory, manager, me, steps)
        elif me.left and known and manager.mounted and not me.buffer and me.life == "alive":
            for index, slab in enumerate(manager.slabs):
                if slab.state in ("free", "visible") and (not slab.wait or self.deviates("granted in spite of `wait`")):
                    ticket = Ticket(index, slab.counter + 2, me.number + 10 * me.left, manager.epoch, slab.fence, slab.counter)
                    granted = slab._replace(
                        state="granted",
                        counter=ticket.generation,
                        writer=me.number,
                        generation=ticket.generation,
                        key=ticket.key,
                        format=ticket.format if world.formats else 0,
                    )
                    step(
                        f"gets a ticket of M{manager.epoch}: slab {index}, generation {ticket.generation}",
                        manager=with_slab(manager, index, granted),
                        left=me.left - 1,
                        ticket=ticket,
                        pc=0,
                    )
        return steps

    def visit(self, memory: tuple[int, ...], manager: Manager, me: Client, steps: list[Step]) -> None:
        """The other thread of client 1 comes or goes. It waits for nothing, so what holds here holds for any other one."""
        text, visitor = ("another thread enters", "inside") if not me.visitor else ("the other thread leaves", "done")
        after = memory, me
        if not me.inside or (me.visitor and self.deviates("U cleared while another thread writes")):
            after = self.store(memory, me, F + 1, int(not me.visitor))
        steps.append(Step(text, "", after[0], manager, after[1]._replace(visitor=visitor)))

    def write(self, memory: tuple[int, ...], manager: Manager, me: Client, steps: list[Step]) -> None:
        """The next word of the write program."""
        pc, ticket = me.pc, me.ticket
        while self.program[pc] == "fence":
            if me.buffer:
                return
            pc += 1
        assert ticket is not None
        if me.pc == 0:  # The slab is pinned once, by the map of that moment.
            moved = self.world.late and me.map != ticket.epoch
            me = me._replace(segment=1 - ticket.slab if moved else ticket.slab)
        base, op = me.segment * SIZE, self.program[pc]
        word = base + WORDS.index(op.rstrip("?").partition("=")[0]) if "=" in op or op in ("F?", "H?", "G?") else -1
        kept = ticket.key if self.deviates("refused slot overwritten") else me.kept[int(op[1])] if op.endswith("kept") else 0
        value = {
            "kept": kept,
            "odd": ticket.generation - 1,
            "even": ticket.generation,
            "key": ticket.key,
            "writer": me.number,
            "namespace": NAMESPACE,
            "format": ticket.format,
        }.get(op.rpartition("=")[2], 0)
        text, ok, otherwise = op, True, self.refused if op in ("G?", "H?") else self.give_up
        if op in ("enter", "leave"):
            gate = base + F + me.number
            alone = me.visitor != "inside" or (op == "leave" and self.deviates("U cleared while another thread writes"))
            if alone and me.inside != (op == "enter"):
                memory, me = self.store(memory, me, gate, int(op == "enter"))
                text = f"{op}s: {name(gate)}={int(op == 'enter')}"
            me = me._replace(inside=op == "enter")
        elif op in ("put_end", "put_revoke"):
            if me.buffer:
                return
            if me.session == ticket.epoch == manager.epoch:
                manager = self.finish(manager, me, published=op == "put_end")
            me, pc = me._replace(ticket=None, kept=()), IDLE - 1
        elif op.startswith("keep "):
            found = self.load(memory, me, base + WORDS.index(op[5:]))
            text, me = f"keeps {op[5:]}={found}", me._replace(kept=(*me.kept, found))
        elif op == "session?":
            ok = me.session == ticket.epoch
            text = f"its session is still that of its ticket{'' if ok else ' no more: gives up'}"
        elif "==" in op or op.endswith("?"):
            found = self.load(memory, me, word)
            if "==" in op:
                ok = found == value
            else:
                ok = found == ticket.fence if op == "F?" else found <= (ticket.format if op == "H?" else ticket.generation - 1)
            text = f"finds {name(word)}={found}" + ("" if ok else ", gives up")
        else:
            memory, me = self.store(memory, me, word, value)
            text = f"{name(word)}={value}"
            if op[0] == "P" and me.number == 1 and self.world.fail:
                steps.append(Step("its copy raises", "fault", memory, manager, me._replace(pc=self.raised)))
        steps.append(Step(text, "", memory, manager, me._replace(pc=pc + 1 if ok else otherwise)))

    def finish(self, manager: Manager, me: Client, published: bool) -> Manager:
        """`put_end` or `put_revoke` as the manager takes it."""
        ticket = me.ticket
        assert ticket is not None
        slab = manager.slabs[ticket.slab]
        if (slab.writer, slab.generation) == (me.number, ticket.generation) and slab.state in ("granted", "resting"):
            slab = slab._replace(state="visible" if published and slab.state == "granted" else "free")
        return with_slab(manager, ticket.slab, slab)

    # -- lender --------------------------------------------------------------------------------------------------------

    def mount_steps(self) -> list[tuple[str, tuple[int, ...]]]:
        """What the lender does at each mount: new fence words, full fence, all U words, fence, all headers."""
        fence: list[tuple[str, tuple[int, ...]]] = [*(("F", (s,)) for s in self.segments), ("fence", ())]
        count = len(self.read_words)
        gates = count - 3 * len(self.segments)
        first, second = tuple(range(gates)), tuple(range(gates, count))
        if not self.gate:
            return [("read", second), ("mount", ())]
        if self.deviates("no fence between F and U: lender"):
            fence.pop()
        if self.deviates("U read before F is written"):
            return [("read", first), *fence, ("read", second), ("mount", ())]
        if self.deviates("headers read before F is written"):
            return [("read", second), *fence, ("read", first), ("mount", ())]
        if self.deviates("U and headers read before F is written"):
            return [("read", first + second), *fence, ("mount", ())]
        if self.deviates("no fence between U and the headers"):
            return [*fence, ("read", first + second), ("mount", ())]
        return [*fence, ("read", first), ("fence", ()), ("read", second), ("mount", ())]

    def fence_word(self, epoch: int, mounts: int, segment: int) -> int:
        """In truth 64 random bits."""
        if self.deviates("F is constant"):
            return 7
        return 100 * epoch if self.deviates("F is the epoch") else 100 * mounts + segment

    def _lender(self, memory: tuple[int, ...], manager: Manager, me: Lender) -> list[Step]:
        steps = list(self.landings(memory, manager, me))
        if me.pc == 0 and manager.mounted:
            if self.gate and not self.deviates("busy words not looked at again"):
                for index, slab in enumerate(manager.slabs):
                    for number in slab.wait:
                        if not memory[index * SIZE + F + number]:
                            told = with_slab(manager, index, slab._replace(wait=slab.wait - {number}))
                            text = f"sees {name(index * SIZE + F + number)}=0, tells M{manager.epoch}"
                            steps.append(Step(text, "", memory, told, me))
            return steps
        note = ""
        if me.pc == 0:
            floor = self.world.floors[manager.epoch - 1]
            if not self.deviates("the clock alone says where generations start"):
                floor = max(floor, me.floor, self.world.floors[0])
            me = Lender(1, manager.epoch, me.mounts + 1, floor, (None,) * len(self.read_words), me.buffer)
            note = f"mounts for M{manager.epoch}: "
        pc = me.pc
        op, items = self.mount_program[pc - 1]
        if op == "fence":
            if me.buffer:
                return steps
            pc, (op, items) = pc + 1, self.mount_program[pc]
        if op == "F":
            address, value = items[0] * SIZE + F, self.fence_word(me.epoch, me.mounts, items[0])
            after, me = self.store(memory, me, address, value)
            steps.append(Step(f"{note}{name(address)}={value}", "", after, manager, me._replace(pc=pc + 1)))
        elif op == "read":
            for i in items:
                if me.seen[i] is None:
                    address = self.read_words[i]
                    value = self.load(memory, me, address)
                    seen = replaced(me.seen, i, value)
                    done = all(seen[other] is not None for other in items)
                    text = f"{note}reads {name(address)}={value}"
                    steps.append(Step(text, "", memory, manager, me._replace(pc=pc + done, seen=seen)))
                    if self.world.memory != "WEAK":
                        break
        elif (manager.epoch, manager.mounted) != (me.epoch, False):
            steps.append(Step("the manager that asked is gone", "", memory, manager, me._replace(pc=0, seen=())))
        elif not me.buffer:
            mounted, lost = self.mount(memory, manager, me)
            text = lost or f"M{me.epoch} knows: {', '.join(describe(slab) for slab in mounted.slabs)}"
            steps.append(Step(text, "lost" if lost else "", memory, mounted, me._replace(pc=0, seen=())))
        return steps

    def mount(self, memory: tuple[int, ...], manager: Manager, me: Lender) -> tuple[Manager, str]:
        """The manager after a mount, and which chunk it has overlooked though nobody was writing."""
        seen = dict(zip(self.read_words, me.seen, strict=True))
        slabs, lost = [], ""
        for s in self.segments:
            generation, key, signer = (seen[s * SIZE + word] for word in (G, K, N))
            held = manager.slabs[s]
            busy = frozenset(number for number in CLIENTS if seen.get(s * SIZE + F + number))
            slab = Slab(
                "free",
                max(held.counter, me.floor, generation + (generation & 1)),
                self.fence_word(me.epoch, me.mounts, s) if self.gate else 0,
                busy - manager.sessions,
            )
            if held.fence and self.deviates("grants carry the F of an earlier mount"):
                slab = slab._replace(fence=held.fence)
            if held.state == "resting":
                slab = held._replace(counter=slab.counter, fence=slab.fence, wait=slab.wait)
            elif generation % 2 == 0:
                slab = slab._replace(state="visible", key=key, generation=generation)
            elif not self.gate:  # An odd header holds its slot itself.
                if signer in CLIENTS and signer not in manager.sessions:
                    slab = slab._replace(state="resting", writer=signer, generation=generation + 1)
                elif signer not in CLIENTS and not self.deviates("unknown signer taken for ended"):
                    slab = slab._replace(wait=frozenset(CLIENTS) - manager.sessions)
            slabs.append(slab)
            now = memory[s * SIZE : s * SIZE + 3]
            overlooked = now[0] % 2 == 0 and now[2] == NAMESPACE and now[:2] != (slab.generation, slab.key)
            if self.gate and not busy and overlooked and slab.state != "resting":
                lost = f"M{me.epoch} overlooks key {now[1]} in slab {s}, generation {now[0]}"
        return manager._replace(mounted=True, slabs=tuple(slabs)), lost

    # -- manager -------------------------------------------------------------------------------------------------------

    def happenings(self, manager: Manager, first: Client, second: Client) -> Iterator[tuple[str, Manager]]:
        """What befalls the manager."""
        world = self.world
        unknown = tuple(Slab("free", 0, 0) for _ in self.segments)
        if manager.epoch < world.managers and not (world.settled and any(map(self.announcing, (first, second)))):
            yield f"M{manager.epoch} ends, M{manager.epoch + 1} starts", Manager(manager.epoch + 1, False, unknown, frozenset())
        for index, slab in enumerate(manager.slabs if manager.mounted else ()):
            if world.lapse and slab.state == "granted":
                resting = with_slab(manager, index, slab._replace(state="resting"))
                yield f"the ticket of W{slab.writer} for slab {index} lapses", resting
            if slab.wait and self.deviates("`wait` cleared by a clock"):
                yield "has waited long enough", with_slab(manager, index, slab._replace(wait=frozenset()))
        if world.remount and manager.mounted and not manager.remounted:
            kept = tuple(
                slab._replace(state="resting", wait=frozenset())
                if slab.state in ("granted", "resting")
                else Slab("free", slab.counter, slab.fence)
                for slab in manager.slabs
            )
            yield "loses its lender's session", manager._replace(mounted=False, slabs=kept, remounted=True)

    def announcing(self, client: Client) -> bool:
        return IDLE < client.pc < self.program.index("P0=key")

    def sharing(self, first: Client, second: Client) -> bool:
        begun, last = self.program.index("G=odd"), self.program.index("G=even")
        return first.segment == second.segment and all(begun < client.pc <= last for client in (first, second))

    # -- reader --------------------------------------------------------------------------------------------------------

    def _reader(self, memory: tuple[int, ...], manager: Manager, me: Reader | str) -> list[Step]:
        if me == "done":
            return []
        if not isinstance(me, Reader):
            return [
                Step(f"is told: key {slab.key} is in slab {index}", "", memory, manager, self.reading(index, slab))
                for index, slab in enumerate(manager.slabs)
                if manager.mounted and slab.state == "visible"
            ]
        steps: list[Step] = []
        expected = {G: me.generation, K: me.key, N: NAMESPACE}
        words = self.groups[me.group]
        for i, word in enumerate(words):
            if me.seen[i] is not None:
                continue
            value = memory[me.slab * SIZE + word]
            after: Reader | str = me._replace(seen=replaced(me.seen, i, value))
            text, kind = f"reads {name(me.slab * SIZE + word)}={value}", ""
            assert isinstance(after, Reader)
            if value != expected.get(word, value):
                text, after = f"{text}: a miss", "done"
            elif None not in after.seen:
                payload = after.seen if words == (P0, P1) else me.payload
                if me.group + 1 < (2 if self.deviates("reader looks at the header once") else 3):
                    after = me._replace(group=me.group + 1, payload=payload, seen=(None,) * len(self.groups[me.group + 1]))
                else:
                    kind = "" if payload == (me.key, me.key) else "wrong"
                    text, after = f"takes {payload} for key {me.key}", "done"
            steps.append(Step(text, kind, memory, manager, after))
            if self.world.memory != "WEAK":
                break
        return steps

    def reading(self, index: int, slab: Slab) -> Reader:
        return Reader(index, slab.key, slab.generation, seen=(None,) * len(self.groups[0]))

    # -- judgement -----------------------------------------------------------------------------------------------------

    def _wrong_bytes(self, memory: tuple[int, ...], manager: Manager) -> str:
        """What a reader that is quick would take for a chunk now, though it is none."""
        for index, slab in enumerate(manager.slabs if manager.mounted else ()):
            words = memory[index * SIZE : index * SIZE + SIZE]
            if slab.state != "visible":
                continue
            if words[:3] == (slab.generation, slab.key, NAMESPACE) and words[P0 : P1 + 1] != (slab.key, slab.key):
                bytes_ = words[P0 : P1 + 1]
                return f"M{manager.epoch}: key {slab.key} in slab {index}, its header is perfect, its bytes are {bytes_}"
            if slab.format and words[H] != slab.format:
                return (
                    f"M{manager.epoch}: key {slab.key} is in slab {index} of format {slab.format}, its header says {words[H]}"
                )
        return ""

    def stuck(self, state: State) -> str:
        """What never works again, in a state in which nothing but faults could still happen. A client that is new must be able
        to put into every slot, refused at most once for each ticket that earlier managers gave."""
        memory, manager, first, second, _, _ = state
        if not manager.mounted:
            return f"M{manager.epoch} is not mounted"
        for client in (first, second):
            if client.life == "alive" and client.session != manager.epoch:
                return f"W{client.number} never says hello"
            if client.life in ("alive", "closed") and client.pc != IDLE:
                return f"W{client.number} hangs at {self.program[client.pc]}"
        for index, slab in enumerate(manager.slabs):
            words = memory[index * SIZE : index * SIZE + SIZE]
            if slab.state in ("granted", "resting") or slab.wait:
                return f"slab {index} is never granted again: {describe(slab)}"
            if self.gate and words[F] != slab.fence:
                return f"slab {index}: its F={words[F]} fits no ticket, they carry {slab.fence}"
            if words[G] > slab.counter + 1 + 2 * sum(self.world.puts):
                return f"slab {index}: put after put is refused for G={words[G]}, the next offers {slab.counter + 2}"
        return ""

    def initial(self) -> State:
        memory: tuple[int, ...] = ()
        slabs = []
        for s in self.segments:
            fence = self.fence_word(1, 1, s) if self.gate else 0
            memory += (2, OLD + s, NAMESPACE, OLD + s, OLD + s, 0, fence, 0, 0)
            slabs.append(Slab("visible", self.world.floors[0], fence, key=OLD + s, generation=2))
        clients = [Client(number, puts) for number, puts in zip(CLIENTS, self.world.puts, strict=True)]
        manager = Manager(1, True, tuple(slabs), frozenset(CLIENTS))
        return memory, manager, clients[0], clients[1], Lender(), "" if self.world.reader else "done"

    def successors(self, state: State) -> Iterator[tuple[str, str, str, State]]:
        """Who, what, kind, state after it."""
        memory, manager, first, second, lender, reader = state
        for text, after in self.happenings(manager, first, second):
            yield "manager", text, "fault", (memory, after, first, second, lender, reader)
        for text, kind, words, known, agent in self.client(memory, manager, first):
            yield "W1", text, kind, (words, known, agent, second, lender, reader)
        for text, kind, words, known, agent in self.client(memory, manager, second):
            yield "W2", text, kind, (words, known, first, agent, lender, reader)
        for text, kind, words, known, agent in self.lender(memory, manager, lender):
            yield "lender", text, kind, (words, known, first, second, agent, reader)
        for text, kind, words, known, agent in self.reader(memory, manager, reader):
            yield "reader", text, kind, (words, known, first, second, lender, agent)

    def check(self, most: int = 10_000_000) -> Verdict:
        """Try everything, the shortest runs first, until bytes are wrong. Raises `RuntimeError` after `most` states."""
        start = self.initial()
        parents: dict[State, State | None] = {start: None}
        layer, stuck, lost = [start], ("", start), ("", start)
        while layer:
            after: list[State] = []
            for state in layer:
                wrong, alone = self.wrong_bytes(state[0], state[1]), True
                if self.world.settled and self.sharing(state[2], state[3]):
                    wrong = "W1 and W2 write in one slot"
                if wrong:
                    return Verdict(len(parents), wrong, "", "", self.trace(state, parents))
                for who, text, kind, following in self.successors(state):
                    alone = alone and kind == "fault"
                    if following not in parents:
                        parents[following] = state
                        after.append(following)
                    if kind == "wrong":
                        return Verdict(len(parents), f"{who} {text}", "", "", self.trace(following, parents))
                    if kind == "lost" and not lost[0]:
                        lost = text, following
                if alone and not stuck[0]:
                    stuck = self.stuck(state), state
            if len(parents) > most:
                raise RuntimeError(f"more than {most} states")
            layer = after
        end = stuck[1] if stuck[0] else lost[1]
        return Verdict(len(parents), "", stuck[0], lost[0], self.trace(end, parents))

    def trace(self, end: State, parents: dict[State, State | None]) -> list[Moment]:
        moments: list[Moment] = []
        before = parents[end]
        while before is not None:
            who, text, _, _ = next(step for step in self.successors(before) if step[3] == end)
            moments.append(Moment(who, text, end[0]))
            end, before = before, parents[before]
        return moments[::-1]


def replaced(values: tuple, index: int, value) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


def name(address: int) -> str:
    segment, word = divmod(address, SIZE)
    return WORDS[word] + "'" * segment


def describe(slab: Slab) -> str:
    waits = "".join(f", waits for W{number}" for number in sorted(slab.wait))
    if slab.state == "visible":
        return f"key {slab.key}, generation {slab.generation}{waits}"
    return f"{slab.state}{f' for W{slab.writer}' if slab.writer else ''}{waits}"


def with_slab(manager: Manager, index: int, slab: Slab) -> Manager:
    return manager._replace(slabs=replaced(manager.slabs, index, slab))


def forget_writer(manager: Manager, number: int) -> Manager:
    """All that this client was writing is over: hello, Goodbye, or the lender's word."""
    slabs = tuple(
        slab._replace(
            state="free" if slab.writer == number and slab.state in ("granted", "resting") else slab.state,
            wait=slab.wait - {number},
        )
        for slab in manager.slabs
    )
    return manager._replace(slabs=slabs, sessions=manager.sessions - {number})


def writer_lost(manager: Manager, number: int) -> Manager:
    """The session of this client ended without Goodbye: it may still write."""
    slabs = tuple(
        slab._replace(state="resting") if (slab.writer, slab.state) == (number, "granted") else slab for slab in manager.slabs
    )
    return manager._replace(slabs=slabs, sessions=manager.sessions - {number})
