"""`vcache lend` whose mounts can be halted."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from soak_windows import Aim, Halts, exit_now, redirect_output

from vcache.cli import app as commands
from vcache.lender.slabs import LentSlabs
from vcache.manager.client import Manager


def main(pipe: Connection, config: dict[str, Any], spec: dict[str, Any]) -> None:
    """Lend as `config["arguments"]` says; `spec` is not used."""
    redirect_output(config["log"])
    os.environ.update(config["env"])
    current = [Halts([], lambda aim: None)]
    numbers: dict[int, Halts] = {}
    inventory, mount = LentSlabs.inventory, Manager.mount

    def read(self: LentSlabs, indices: Sequence[int]) -> Any:
        found = []
        for place, index in enumerate(indices):
            current[0].reach("reading", place)
            found += inventory(self, [index])
        return found

    def mounting(self: Manager, *arguments: Any) -> int:
        current[0].reach("mounting")
        number = mount(self, *arguments)
        current[0].reach("mounted")
        return number

    def listen() -> None:
        try:
            while True:
                kind, number, *request = pipe.recv()
                if kind == "go":
                    numbers[number].go_on()
                    continue

                def report(aim: Aim, number: int = number) -> None:
                    pipe.send(("halted", (number, aim)))

                halts = Halts(request[2], report)
                numbers[number] = current[0] = halts
        except EOFError:
            exit_now()

    LentSlabs.inventory, Manager.mount = read, mounting  # type: ignore[method-assign, assignment]
    pipe.send(("value", "ready"))
    threading.Thread(target=listen, daemon=True).start()
    commands.app(config["arguments"])
