"""Entry point `vllm.general_plugins`: makes the name `VCacheConnector` known to vLLM in every one of its processes."""

from __future__ import annotations

NAME = "VCacheConnector"
MODULE = "vcache.integrations.vllm.connector"


def register() -> None:
    """Register the connector with vLLM's factory. Idempotent: vLLM calls it in the API server, the engine and each worker."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
