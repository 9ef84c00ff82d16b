"""Sparse prefill in vLLM: a plugin that finds itself through the entry point `vllm.general_plugins`."""

__all__ = ["register"]


def register() -> None:
    """Tell vLLM about the backend and the model classes; vLLM calls this once or more in each of its processes.

    Nothing changes for a model that is served without `--additional-config '{"topmass": {...}}'`.
    """
    from topmass.integrations.vllm import versions

    versions.register()
