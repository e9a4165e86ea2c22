"""The giving side of the pool: what lends a segment of memory, slab by slab, to processes of this host and of others."""
