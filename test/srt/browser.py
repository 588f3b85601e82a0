"""The page in a real browser, and jobs for it to show."""

import json
import math
import random
import shutil
import time
from types import SimpleNamespace

import pytest

import service_app
from sglang.srt.mezo.service.http import page
from sglang.srt.mezo.service.http.latency import LatencyRecorder
from sglang.srt.mezo.service.jobs.hyperparameters import resolve, stored
from sglang.srt.mezo.service.wire.records import StoredCheckpoint, StoredEvent, StoredFile, StoredJob, new_id, now

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


ATTACKS = ("<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>")


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


WAIT = 120  # seconds until what is expected must be there; the page polls every two


# Texts whose contrast with what is behind them is below 4.5, the least that WCAG's level AA allows.
TOO_FAINT = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = node => !node ? getComputedStyle(document.documentElement).backgroundColor
    : numbers(getComputedStyle(node).backgroundColor)[3] === 0 ? behind(node.parentElement)
    : getComputedStyle(node).backgroundColor;
  const hasText = node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  const shown = node => hasText(node) && node.getClientRects().length;
  return [...document.querySelectorAll("body *")].filter(shown).map(node => {
      const style = getComputedStyle(node);
      const pair = [light(node instanceof SVGElement ? style.fill : style.color), light(behind(node))].sort();
      return [(pair[1] + 0.05) / (pair[0] + 0.05), node.textContent];
    }).filter(([contrast]) => contrast < 4.5);
})()"""


# --- jobs to look at --------------------------------------------------------------------------------------------------


def add_file(service, filename: str) -> str:
    file = StoredFile(new_id("file-"), filename, "fine-tune", 13, now(), "processed")
    service.store.partial_path(file.id).write_text('{"text": "a"}')
    service.store.add_file(file)
    return file.id


def add_job(service, status: str, filename: str = "train.jsonl", step: int = 0, **changes) -> StoredJob:
    request = {
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"max_steps": 2000, "learning_rate": 0.001}}}
    }
    config, hyperparameters = resolve(request, service.engine, 512, 42)
    fields = {
        "id": new_id("ftjob-"),
        "created_at": now() - 754,
        "finished_at": None,
        "model": "tiny",
        "validation_file": None,
        "seed": 42,
        "suffix": None,
        "adapter_name": "ft",
        "metadata": {},
        "fine_tuned_model": None,
        "trained_tokens": None,
        "error": None,
        "training_file": add_file(service, filename),
        "version": 0,
    }
    fields |= {
        "status": status,
        "request": request,
        "hyperparameters": hyperparameters,
        "config": stored(config),
        "step": step,
        **changes,
    }
    job = StoredJob(**fields)
    return service.store.add_job(job, StoredEvent(job.id, f"Created fine-tuning job: {job.id}"))


def add_event(service, job_id: str, message: str, **fields) -> None:
    service.store.update_job(job_id, StoredEvent(job_id, message, **fields))


def train(service, job: StoredJob, steps: range) -> None:
    """Append what a run writes to metrics.jsonl in these steps."""
    path = service.store.job_directory(job.id) / "run" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for step in steps:
            loss, noise = (
                0.18 + 0.55 * math.exp(-step / 600),
                0.05 * math.sin(step * 1.7) + 0.03 * math.sin(step * 0.37),
            )
            lines = [{"loss": loss, "loss_plus": [loss + noise], "loss_minus": [loss + noise - 0.01]}] * (
                step % 10 == 0
            )
            if step % 250 == 0:
                lines.append({"eval_loss": loss + 0.03, "eval_accuracy": 0.93 - 0.43 * math.exp(-step / 400)})
            file.writelines(json.dumps({"step": step, **line}) + "\n" for line in lines)


def add_traffic(service) -> None:
    """Half an hour of requests: training ran from ten to twenty minutes ago, and runs since two."""
    clock = SimpleNamespace(now=time.time() - 1795)
    service.latency = LatencyRecorder(lambda: clock.now)
    chance = random.Random(0)
    for second in range(1795):
        clock.now += 1
        beside = second in range(600, 1200) or second > 1675
        service.latency.set_training(beside)
        wave = 1 + 0.1 * math.sin(second / 90)
        ttft, tpot = (wave * chance.lognormvariate(0, 0.25) for _ in range(2))
        service.latency.record(0.031 * ttft * (1.25 if beside else 1), 0.0092 * tpot * (1.1 if beside else 1))


def fill(service) -> StoredJob:
    """A handful of jobs, as after a day of work; the newest is running."""
    done = add_job(
        service, "succeeded", suffix="sentiment", fine_tuned_model="tiny:sentiment", finished_at=now() - 200, step=2000
    )
    train(service, done, range(10, 2001, 10))
    failed = {"code": "invalid_training_file", "message": f"{ATTACKS[1]}.jsonl:3: no prompt", "param": "training_file"}
    words = {"suffix": ATTACKS[1], "metadata": {ATTACKS[0]: ATTACKS[1]}, "error": failed}
    add_job(service, "failed", filename=f"{ATTACKS[0]}.jsonl", finished_at=now(), **words)
    add_job(service, "paused", suffix="topics")
    add_job(service, "queued")
    running = add_job(service, "running", suffix="reviews", metadata={"team": "search"})
    service.store.update_job(running.id, validation_file=add_file(service, "validation.jsonl"))
    train(service, running, range(10, 841, 10))
    train(service, running, range(0, 1))
    for step in (250, 500, 750):
        metrics = {
            "step": step,
            "train_loss": 0.4,
            "valid_loss": 0.42 - step / 5000,
            "valid_mean_token_accuracy": 0.7 + step / 5000,
        }
        service.store.add_checkpoint(
            StoredCheckpoint(running.id, step, f"reviews:ckpt-step-{step}", f"run/checkpoint-{step}", metrics)
        )
        add_event(service, running.id, f"Checkpoint created at step {step}")
    add_event(service, running.id, "the loss has not fallen for 200 steps", level="warn")
    add_event(
        service, running.id, "Step 840/2000: training loss=0.32", type="metrics", data={"step": 840, "train_loss": 0.32}
    )
    add_traffic(service)
    return running


# --- the browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip(f"needs chromium and chromedriver on the path (chromium: {CHROMIUM}, chromedriver: {DRIVER})")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in the browser, as somebody sees it."""

    def __init__(self, driver, port: int):
        self.driver = driver
        self.origin = f"http://127.0.0.1:{port}"

    def open(self, width: int = 1280) -> "Page":
        self.driver.set_window_size(width, 1000)
        self.driver.get(f"{self.origin}/mezo")
        return self

    def run(self, script: str):
        return self.driver.execute_script(f"return {script}")

    def text(self, selector: str) -> str:
        return " ".join(self.all(selector))

    def all(self, selector: str) -> list[str]:
        """Texts of the nodes that can be seen."""
        nodes = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.run(f"{nodes}.filter(node => node.checkVisibility()).map(node => node.innerText)")

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def type(self, selector: str, text: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(text)

    def wait(self, condition) -> None:
        """Until ``condition()`` is true; what it says then is in the failure's traceback."""
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, (
                f"{self.text('#connection')} | {self.text('#problem')} | {self.text('main')[:2000]}"
            )
            time.sleep(0.1)

    def wait_live(self) -> "Page":
        self.wait(lambda: self.run("document.querySelector('#connection').dataset.state") == "live")
        return self

    def row(self, job: StoredJob) -> list[str]:
        return self.all(f'#jobs tr[data-key="{job.id}"] td')

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requested(self) -> set[str]:
        """Every address that the browser asked the network for."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


def make_app(service, **keys: str):
    app = service_app.make_app(service, **keys)
    page.install(app)
    if keys:
        page.after_keys(None, app, **keys)
    return app


@pytest.fixture
def service(tmp_path):
    service = service_app.make_service(tmp_path)
    service.latency = LatencyRecorder()
    yield service
    service.close()


@pytest.fixture
def opened(chromium, service, request):
    """The page on a server, with keys where the test's parameter gives some."""
    app = make_app(service, **getattr(request, "param", {}))
    with service_app.serving(app) as port:
        chromium.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": f"http://127.0.0.1:{port}", "storageTypes": "all"}
        )
        chromium.get_log("browser"), chromium.get_log("performance")
        yield Page(chromium, port)
        chromium.get("about:blank")
