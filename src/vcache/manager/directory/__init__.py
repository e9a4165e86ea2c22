"""Who has which chunk where, as a state machine: no sockets, threads or clocks."""
