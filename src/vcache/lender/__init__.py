"""The giving side of the pool: a segment of memory, its slabs, and the socket that hands them over."""
