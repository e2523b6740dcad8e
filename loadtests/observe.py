"""Our server under load, scraped by a real Prometheus, without Docker: ``make observe``.

    python -m loadtests.observe --out build/observe --minutes 1 --users 9

Starts our server with the demo model, and a Prometheus with the configuration and rules of ``deploy/prometheus`` that
scrapes it every second. After a few seconds without pruning (dashboard only), every kind of user asks in a closed loop.
Prints a table, the firing alerts, and the dashboard panels without data, and writes to ``--out``:

- ``report.html``, ``requests.jsonl`` and ``result.json``, as after every load test (`loadtests.locustfile`),
- ``dashboard.png``: what the dashboard's queries give (`deploy.grafana.plot`),
- ``report.png``: the report in a browser, if there is one beside this Python or on the PATH,
- the logs of server, Prometheus and Locust.

The exit status is 1 if a request failed or nothing was pruned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageChops

from deploy.grafana.plot import Prometheus, answers, plot
from loadtests.drive import DriveFailed, drive
from loadtests.options import positive
from loadtests.report import results_text
from vllm_vtprune_evaluation.load.client import served_model
from vllm_vtprune_evaluation.load.results import broken, result
from vllm_vtprune_evaluation.options import count
from vllm_vtprune_server.process import ServerFailed, free_port, running_server, stop

CONFIGURATION = Path(__file__).parent.parent / "deploy" / "prometheus" / "prometheus.yml"
EVERY = "1s"
INTERVAL = "10s"  # of the rates in the dashboard
SERVE_OPTIONS = ("--max-model-len", "2048", "--enforce-eager", "--disable-uvicorn-access-log")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
LABEL = "ours"
PRUNING = "balanced"
WARM_UP = 5.0  # seconds without pruning, as a baseline for panels that compare
PROMETHEUS_PATIENCE = 30.0  # seconds
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "firefox")
BROWSER_PATIENCE = 120.0  # seconds
PAGE = (1280, 6000)  # pixels; the empty part below the report is cropped


class PrometheusFailed(RuntimeError):
    """Prometheus is missing, or does not see the server; the message has the solution, or the end of its log."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.observe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=positive, default=1, help="how long (default: 1)")
    parser.add_argument("--users", type=count, default=9, help="who ask at the same time (default: 9)")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        print("Starting our server and Prometheus ...", file=sys.stderr)
        with (
            running_server(SERVE_OPTIONS, environment=ENVIRONMENT, log=out / "server.log") as url,
            running_prometheus(url, log=out / "prometheus.log") as prometheus,
        ):
            model = served_model(url)
            start = time.time()
            drive(url, out / "warm-up", users=2, seconds=WARM_UP, kinds=["FreshImages"], options=["--pruning", "false"])
            records = drive(
                url,
                out,
                users=options.users,
                seconds=60 * options.minutes,
                kinds=(),
                options=["--label", LABEL, "--pruning", PRUNING],
            )
            panels = answers(prometheus, start, time.time(), interval=INTERVAL, step=1)
            alerts = prometheus.get("alerts")["alerts"]
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, PrometheusFailed, DriveFailed) as error:
        sys.exit(f"loadtests: {error}")
    plot(panels, out / "dashboard.png")
    print(results_text({LABEL: result(records, model=model, label=LABEL, users=options.users)}))
    print(f"alerts that fire: {names(alerts, 'firing')}; that will if it goes on like this: {names(alerts, 'pending')}")
    print(f"panels without data: {', '.join(panel.title for panel, series in panels if not series) or 'none'}")
    complaint = screenshot(out / "report.html", out / "report.png")
    if complaint:
        print(f"no report.png: {complaint}")
    for file in ("report.html", "requests.jsonl", "result.json", "dashboard.png", "report.png"):
        if (out / file).exists():
            print(out / file)
    complaints = broken(records, {}, PRUNING)
    if complaints:
        sys.exit("\n".join(f"loadtests: {complaint}" for complaint in complaints))


def names(alerts: Sequence[dict[str, Any]], state: str) -> str:
    """Names of the alerts in a Prometheus state, as text."""
    return ", ".join(sorted({alert["labels"]["alertname"] for alert in alerts if alert["state"] == state})) or "none"


def installed(program: str) -> str | None:
    """The path of a program, beside this Python or else on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which(program, path=path)


@contextmanager
def running_prometheus(url: str, *, log: Path) -> Iterator[Prometheus]:
    """Run a Prometheus with our configuration and rules that scrapes a server every second.

    Raises:
        PrometheusFailed: Prometheus is neither beside this Python nor on the PATH, or does not see the server.
    """
    program = installed("prometheus")
    if program is None:
        raise PrometheusFailed("prometheus is missing: `make setup` brings it; see CONTRIBUTING.md for what that needs")
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="vtprune-") as folder:
        configuration = Path(folder) / "prometheus.yml"
        configuration.write_text(yaml.safe_dump(fast(yaml.safe_load(CONFIGURATION.read_text()), url)))
        command = [program, f"--config.file={configuration}", f"--storage.tsdb.path={folder}/data"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, f"--web.listen-address={address}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            prometheus = Prometheus(f"http://{address}")
            wait_until_seen(prometheus, log)
            yield prometheus
        finally:
            stop(process)


def fast(configuration: dict[str, Any], url: str) -> dict[str, Any]:
    """Our configuration with one target and a short interval."""
    [scrape] = configuration["scrape_configs"]
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
        "rule_files": [str(CONFIGURATION.parent / rules) for rules in configuration["rule_files"]],
        "scrape_configs": [{**scrape, "static_configs": [{"targets": [url.removeprefix("http://")]}]}],
    }


def wait_until_seen(prometheus: Prometheus, log: Path) -> None:
    deadline = time.monotonic() + PROMETHEUS_PATIENCE
    while time.monotonic() < deadline:
        try:
            if prometheus.get("query", query="up == 1")["result"]:
                return
        except (OSError, RuntimeError):
            pass  # not ready yet
        time.sleep(0.5)
    raise PrometheusFailed(f"Prometheus did not get to see the server:\n{log.read_text(errors='replace')[-3000:]}")


def screenshot(page: Path, out: Path) -> str | None:
    """Save a screenshot of a page in the first installed browser of `BROWSERS`; returns the problem, or None."""
    out.unlink(missing_ok=True)
    browser = next(filter(None, map(installed, BROWSERS)), None)
    if browser is None:
        where = "beside this Python or on the PATH (on Debian: apt-get install chromium)"
        return f"found none of {', '.join(BROWSERS)} {where}"
    width, height = PAGE
    with tempfile.TemporaryDirectory(prefix="vtprune-") as profile:
        if Path(browser).name == "firefox":
            command = [browser, "--headless", "--profile", profile, f"--window-size={width},{height}"]
            command += ["--screenshot", str(out.resolve())]
        else:
            command = [browser, "--headless", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
            command += ["--disable-gpu", "--hide-scrollbars", f"--screenshot={out.resolve()}"]
            if os.geteuid() == 0:
                command.append("--no-sandbox")  # Chromium's does not work for root
        command.append(page.resolve().as_uri())
        try:
            completed = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_PATIENCE)
        except subprocess.TimeoutExpired:
            return f"{browser} did not finish within {BROWSER_PATIENCE:.0f} s"
    if not out.exists():
        return f"{browser} ended with status {completed.returncode}: {completed.stderr[-500:]}"
    with Image.open(out) as image:
        picture = image.convert("RGB")
    *_, bottom = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).getbbox() or (*PAGE, height)
    picture.crop((0, 0, picture.width, min(bottom + 32, picture.height))).save(out)
    return None


if __name__ == "__main__":
    main()
