"""The OpenAI-compatible server: vLLM's own routes for conversations, plus the ``pruning`` field and its report."""
