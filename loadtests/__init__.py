"""Load tests and latency measurements of a server.

Commands: ``compare``, ``soak``, ``observe``, ``ttft``, ``families`` and ``plan``; see ``python -m loadtests.ttft
--help``.
"""
