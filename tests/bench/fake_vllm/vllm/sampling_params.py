class RequestOutputKind:
    CUMULATIVE, FINAL_ONLY = range(2)
