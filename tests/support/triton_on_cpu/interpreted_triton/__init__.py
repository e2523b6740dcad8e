"""A backend of Triton by the name of ``cpu``, with which vLLM uses Triton on a CPU. TRITON_INTERPRET=1 runs kernels.

In the folder above, put on PYTHONPATH, Triton finds it by its entry point. Nothing is ever compiled.
"""
