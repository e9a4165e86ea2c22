"""What the demo and its two workers say to each other: one JSON line per message over the worker's stdin and stdout."""

from __future__ import annotations

import msgspec

from ..errors import VCacheError


class DemoError(VCacheError):
    """The demo cannot go on. The text is one line: what, where, and what to do."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class Prepare(_Message, frozen=True):
    """Convert the model unless a complete copy is cached, and look for GPUs. Answered by `Prepared`."""

    device: str
    """`auto`, `cpu` or `cuda`."""
    cache_dir: str


class Prepared(_Message, frozen=True):
    model_dir: str
    revision: str
    """Digest of the model file: part of the namespace of every chunk."""
    devices: list[str]
    """Torch devices of worker 1, worker 2: `cpu` twice, or `cuda:0` and the last GPU."""
    dtype: str


class Load(_Message, frozen=True):
    """Load the model and the document, compute a few tokens to warm up. Answered by `Loaded`."""

    model_dir: str
    revision: str
    device: str
    dtype: str
    tokens: int
    """Length wanted of the document."""
    block_size: int
    """Tokens in a block of this worker's paged KV cache."""


class Loaded(_Message, frozen=True):
    chapters: int
    token_bytes: int
    """Bytes of KV per token."""


class Connect(_Message, frozen=True):
    """Open a `VCacheEngine` on this manager. Answered by `Connected`."""

    address: str


class Connected(_Message, frozen=True):
    pass


class Ask(_Message, frozen=True):
    """Answer a question about the document in a fresh paged cache. Answered by `Progress` messages, then `Answer`."""

    question: str
    cached: bool
    """Look up and retrieve first; without it VCache is not touched."""
    store: bool = False
    max_tokens: int = 24


class Answer(_Message, frozen=True):
    prompt_tokens: int
    hit_tokens: int
    """What `lookup` said."""
    used_tokens: int
    """Tokens whose KV was retrieved and not computed."""
    ids: list[int]
    text: str
    first_token: float
    """Seconds from the prompt's token ids to the first token of the answer, look-up and retrieve included."""
    logits_digest: str
    """Digest of the logits from which the first token was taken: equal only if they are equal bit for bit."""
    lookup: float
    """Seconds, like the rest."""
    retrieve: float
    retrieved_bytes: int
    store: float
    stored_bytes: int


class Probe(_Message, frozen=True):
    """Only look a question's prompt up. Answered by `Probed`."""

    question: str


class Probed(_Message, frozen=True):
    hit_tokens: int
    seconds: float


class Progress(_Message, frozen=True):
    """Something slow moves."""

    what: str
    done: int
    total: int


class Failed(_Message, frozen=True):
    """The request could not be done; the worker goes on."""

    error: str


Request = Prepare | Load | Connect | Ask | Probe
Reply = Prepared | Loaded | Connected | Answer | Probed | Progress | Failed
