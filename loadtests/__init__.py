"""Load tests with Locust: what clients of a server wait for, and whether it holds what it promises."""
