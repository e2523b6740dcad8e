"""Everything that imports vLLM, except the server: the plugin entry point, processors and model subclasses."""
