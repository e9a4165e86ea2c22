"""Where chunks are, as one engine or worker sees it: pool, other hosts, storage."""
