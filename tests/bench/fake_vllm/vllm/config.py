class KVTransferConfig:
    def __init__(self, **options: object) -> None:
        self.options = options
