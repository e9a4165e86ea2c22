"""`vcache demo`: two processes with a real language model share the KV of one long document."""
