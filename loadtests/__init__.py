"""What clients of a server wait for, and whether it holds what it promises: load tests, and the parts of one request.

Each of ``compare``, ``soak``, ``observe``, ``ttft``, ``families`` and ``plan`` is a command that says what it measures:
``python -m loadtests.ttft --help``.
"""
