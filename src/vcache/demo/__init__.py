"""`vcache demo`: two real inference engines share one document's KV."""

from ..errors import VCacheError


class DemoError(VCacheError):
    """The demo cannot go on. The text is one line: what, where, and what to do."""
