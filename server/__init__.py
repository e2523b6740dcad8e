"""The OpenAI-compatible server: vLLM's own chat completions, plus the ``pruning`` field and its report."""
