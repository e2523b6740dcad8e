"""All code that imports vLLM, except the server: plugin entry point, processors, model subclasses."""
