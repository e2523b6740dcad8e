"""Settings of every test: no model hub, small KV caches, and one thread for small tensors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more crawl where engines keep the cores busy
