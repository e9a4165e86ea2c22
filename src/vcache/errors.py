"""Every exception that VCache raises. In the data path a failure is a miss plus a counter, never one of these."""

from collections.abc import Callable


class VCacheError(Exception):
    """Base of all VCache exceptions. The text is one line: what, where, and what to do."""


class ConfigError(VCacheError, ValueError):
    """A configuration value is missing, unknown or wrong. The text names the key."""


class SpecError(VCacheError, ValueError):
    """A `KVCacheSpec` is impossible in itself, or the tensors handed over contradict it."""


class LayoutError(VCacheError, ValueError):
    """The paged KV cache has a shape, stride or dtype that no known layout explains."""


class ArgumentError(VCacheError, ValueError):
    """A public call got a wrong mask, slot mapping, offset or token sequence."""


class ManagerError(VCacheError):
    """A call to the manager failed."""


class ManagerUnavailableError(ManagerError, ConnectionError):
    """The manager cannot be reached, or the circuit breaker is open after it could not be reached."""


class DeadlineExceededError(ManagerUnavailableError, TimeoutError):
    """The manager did not answer within the call's deadline."""


class ManagerRefusedError(ManagerError):
    """The manager answered, and refused: bad token, wrong user, a request that contradicts its state."""


class ProtocolError(ManagerError):
    """A frame that no conforming peer sends, or a peer that speaks another protocol version."""


class AddressInUseError(VCacheError, OSError):
    """Another manager already serves this address."""


class SegmentError(VCacheError):
    """A segment could not be created, grown, exported or mapped."""


class SlabGoneError(SegmentError):
    """The lender no longer lends this slab. Readers treat its chunks as misses."""


class DeviceUnavailableError(VCacheError):
    """The GPU, driver or a CUDA feature that this call needs is missing."""


class StorageError(VCacheError):
    """The storage tier failed or is bypassed by its circuit breaker."""


class StorageDeadlineError(StorageError):
    """A call to the storage tier outlasted its deadline. It still runs: its buffers must not be reused before it ends."""

    def __init__(self, message: str, when_over: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(message)
        self.when_over = when_over
        """Registers a callback for the end of the call (called at once when it is over already)."""


class IntegrityError(VCacheError, AssertionError):
    """`check_integrity` found a broken invariant: a bug in VCache. The text names the rule (I1-I10)."""


TRANSFER_ERRORS = (Exception,)
"""What a broken transfer may raise: bindings, compilers and torch have exceptions of their own. Each is a miss, or a write that
did not happen, and is counted."""
