"""The directory as a process: sockets, sessions, a clock."""
