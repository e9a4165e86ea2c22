"""Who plays the story: two engines, each a process with VCache in it, and what each of their answers is known by."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Run(NamedTuple):
    """One answer, and what the engine's own counters say about it."""

    prompt_tokens: int
    own_tokens: int
    """Prompt tokens that the engine had in a prefix cache of its own."""
    hit_tokens: int
    """Prompt tokens that VCache promised."""
    loaded_tokens: int
    """Tokens that VCache loaded and verified, and that were not computed."""
    load_bytes: int
    load_seconds: float
    """From the start of a load to its end."""
    first_token: float
    """Seconds to the first token of the answer, everything included; each cast says what it measures."""
    text: str
    ids: list[int]
    """Tokens of the answer; empty when the engine does not tell them."""
    prompt_ids: list[int]
    """Tokens of the prompt, chat template included."""
    logits_digest: str = ""
    """Of the logits from which the first token was taken: equal only if they are equal bit for bit. Empty: not told."""
    lookup_seconds: float = 0.0
    """0: not told, as the rest."""
    stored_bytes: int = 0
    store_seconds: float = 0.0


class Found(NamedTuple):
    """What a look-up said."""

    tokens: int
    seconds: float


class Player(Protocol):
    """One engine. Its calls block; all raise `DemoError` when the engine is gone, silent or wrong."""

    @property
    def pid(self) -> int: ...

    def wait_ready(self) -> None:
        """Return when it takes questions."""

    def count(self, text: str) -> int:
        """Count the tokens of `text`."""

    def ask(self, prompt: str, *, salt: str = "", max_tokens: int = 24) -> Run:
        """Answer a prompt with the likeliest tokens. With a `salt`, only what was computed under the same salt can be a hit."""

    def look_up(self, prompt: str) -> Found | None:
        """Ask VCache for a prompt without answering it; None when this engine cannot be asked."""

    def kill(self) -> None:
        """SIGKILL it and all that it started."""


class Cast(Protocol):
    """Two engines of one kind, A and B, that can be started again and again."""

    @property
    def engines(self) -> str:
        """Name what they are, for the user."""

    @property
    def measured(self) -> str:
        """Say how the numbers of a `Run` come about, for the user."""

    @property
    def own_cache(self) -> bool:
        """Say whether an engine keeps what it computed for its next question. If so, B answers the same question once more from
        there, and cannot show a hit in VCache again; if not, it shows one after the manager's end, and A need not come back."""

    def start(self, number: int) -> Player:
        """Start engine A (0) or B (1); it ends with the demo. Does not wait until it is ready."""
