"""In place of the real package: fails as its libraries do where the system library libibverbs1 is missing."""
