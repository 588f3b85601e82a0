"""The page /mezo/ in headless Chromium, on the real routes and a real store: no engine is needed to look at jobs."""

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
from sglang.srt.mezo.service.wire.errors import RequestError
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


def test_jobs_curves_and_latency_appear_and_follow(opened, service):
    running = fill(service)
    opened.open().wait_live()
    assert opened.text("h1") == "Fine-tuning tiny"
    assert "float32" in opened.text("#server-facts")
    assert len(opened.all("#jobs tbody tr")) == 5
    name, status, steps, loss, accuracy, *_ = opened.row(running)
    assert (name, status) == (f"reviews\n{running.id}", "running")
    assert steps.startswith("840 of 2,000") and loss.startswith("0.3") and accuracy.endswith("%")

    assert opened.text("#job-title") == "reviews"
    assert "validates on validation.jsonl" in opened.text("#job-line")
    assert opened.all("#events li span")[0] == "Step 840/2000: training loss=0.32"
    assert opened.all("#checkpoints tbody tr td:first-child")[0] == "tiny:reviews:ckpt-step-750"
    assert "learning_rate\n0.001" in opened.text("#hyperparameters")
    assert [label.split()[0] for label in opened.all("#loss .legend li")] == ["each", "mean", "validation"]
    for chart in ("loss", "accuracy", "ttft", "tpot"):
        assert opened.run(f"document.querySelectorAll('#{chart} svg path').length") > 0, chart
        assert "NaN" not in opened.run(f"document.querySelector('#{chart} svg').outerHTML"), chart
    assert opened.run("document.querySelectorAll('#ttft rect.band').length") == 2

    sides = service.latency.summary()
    shown = opened.all("#ttft .sides tbody tr:last-child td")
    assert shown[0] == f"{1000 * sides['training']['ttft_seconds']['p99']:.3g} ms"
    assert shown[1] == f"{1000 * sides['idle']['ttft_seconds']['p99']:.3g} ms"
    assert shown[2].startswith("× 1.")
    assert opened.all("#tpot .sides tfoot td")[:2] == [f"{sides[side]['count']:,}" for side in ("training", "idle")]

    before = opened.run("document.querySelector('#loss svg path.first').getAttribute('d')")
    train(service, running, range(850, 1001, 10))
    add_event(service, running.id, "Step 1000/2000: training loss=0.28")
    opened.wait(lambda: opened.row(running)[2].startswith("1,000 of 2,000"))
    opened.wait(lambda: opened.all("#events li span")[0] == "Step 1000/2000: training loss=0.28")
    assert opened.run("document.querySelector('#loss svg path.first').getAttribute('d')") != before

    assert opened.errors() == []
    assert all(url.startswith((opened.origin, "data:")) for url in opened.requested())


def test_names_and_messages_stay_text(opened, service):
    fill(service)
    opened.open().wait_live()
    opened.driver.find_element("link text", ATTACKS[1]).click()
    opened.wait(lambda: opened.text("#job-title") == ATTACKS[1])
    opened.wait(lambda: f"trains on {ATTACKS[0]}.jsonl" in opened.text("#job-line"))
    assert f"{ATTACKS[0]}: {ATTACKS[1]}" in opened.text("#job-line")
    assert opened.text("#job-error").startswith(f"{ATTACKS[1]}.jsonl:3")
    assert opened.run("window.hacked") is None
    assert opened.run("document.querySelectorAll('main script, img').length") == 0
    assert opened.errors() == []


def test_markup_that_got_in_would_do_nothing(opened, service):
    opened.open().wait_live()
    add = "document.body.append(Object.assign(document.createElement(arguments[0]), {[arguments[1]]: arguments[2]}))"
    for markup in (
        ("script", "textContent", "window.hacked = 1"),
        ("img", "src", "https://example.com/"),
        ("a", "innerHTML", ATTACKS[1]),
    ):
        opened.driver.execute_script(add, *markup)
    violations = []
    opened.wait(lambda: violations.extend(opened.errors()) or len(violations) >= 3)
    assert all("Content Security Policy" in violation for violation in violations)
    assert opened.run("window.hacked") is None


def test_an_empty_server_says_what_to_do(opened, service):
    opened.open().wait_live()
    code = opened.text("#how-to")
    assert f'base_url="{opened.origin}/v1"' in code and 'model="tiny"' in code
    assert not opened.text("#jobs-panel") and not opened.text("#job")
    assert opened.all("#ttft .empty") == ["No request in the last half hour."]

    namespace = {"open": lambda *_: ("train.jsonl", b'{"prompt": "a", "completion": "b"}\n')}
    exec(code, namespace)  # the page's own words make a job
    opened.wait(lambda: len(opened.all("#jobs tbody tr")) == 1)
    assert opened.row(namespace["job"])[0] == namespace["job"].id
    assert opened.errors() == []


def test_jobs_are_paused_resumed_and_cancelled(opened, service):
    job = add_job(service, "running")
    opened.open().wait_live()
    assert opened.all("#jobs button") == ["Pause", "Cancel"]
    opened.click("[data-action=pause]")
    opened.wait(lambda: opened.row(job)[1] == "paused")
    opened.click("[data-action=resume]")
    opened.wait(lambda: opened.row(job)[1] == "queued")
    opened.click("[data-action=cancel]")
    opened.driver.switch_to.alert.dismiss()
    assert service.store.job(job.id).status == "queued"
    opened.click("[data-action=cancel]")
    opened.driver.switch_to.alert.accept()
    opened.wait(lambda: opened.row(job)[1] == "cancelled")
    assert opened.all("#jobs button") == []


def test_a_refused_action_says_why(opened, service, monkeypatch):
    async def refuse(job_id):
        raise RequestError(409, f"another job needs {ATTACKS[1]}", None, "conflict")

    monkeypatch.setattr(service.manager, "pause", refuse)
    job = add_job(service, "running")
    opened.open().wait_live()
    opened.click("[data-action=pause]")
    opened.wait(lambda: opened.text("#notice") == f"Could not pause {job.id}: another job needs {ATTACKS[1]}.")


@pytest.mark.parametrize("opened", [{"api_key": "user-key", "admin_api_key": "admin-key"}], indirect=True)
def test_keys_are_asked_for_and_used(opened, service):
    job = add_job(service, "running")
    opened.open()
    opened.wait(lambda: opened.text("#problem") == "This server wants an API key.")
    assert opened.run("document.querySelector('#connection').dataset.state") == "lost"
    assert not opened.text("#jobs-panel") and "tiny" not in opened.text("body")

    opened.type("#api-key", "wrong-key")
    opened.click("#keys [type=submit]")
    opened.wait(lambda: opened.text("#problem") == "The server does not accept this API key.")
    opened.run("document.querySelector('#keys').hidden") and opened.click("#open-keys")
    opened.type("#api-key", "user-key\n")
    opened.wait_live()
    assert opened.text("#problem") == "" and opened.row(job)[1] == "running"

    opened.click("[data-action=pause]")
    opened.wait(lambda: "the key that was given does not allow it" in opened.text("#notice"))
    opened.click("#open-keys")
    opened.type("#admin-key", "admin-key\n")
    opened.click("[data-action=pause]")
    opened.wait(lambda: opened.row(job)[1] == "paused")
    assert opened.text("#notice") == ""

    opened.open().wait_live()  # the tab keeps the keys
    opened.click("#open-keys")
    opened.click("#forget-keys")
    opened.wait(lambda: opened.text("#problem") == "This server wants an API key.")


def test_a_server_that_went_away_is_found_again(opened, service):
    add_job(service, "running")
    opened.open().wait_live()
    opened.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    opened.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **offline})
    opened.wait(lambda: opened.text("#problem").startswith("The server does not answer"))
    assert len(opened.all("#jobs tbody tr")) == 1  # what was known stays
    opened.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **offline})
    opened.wait_live()
    service.ready = False
    opened.wait(lambda: "(503)" in opened.text("#problem"))
    service.ready = True
    opened.wait_live()
    assert opened.text("#problem") == ""


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_and_can_be_read(opened, service, width, scheme):
    fill(service)
    opened.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        opened.open().wait_live()
        assert width - 20 <= opened.run("document.documentElement.scrollWidth") <= width
        assert opened.run("document.querySelectorAll('#loss svg path').length") > 0
        assert opened.run(TOO_FAINT) == []
        assert opened.run("[...document.querySelectorAll('input')].filter(input => !input.labels.length).length") == 0
    finally:
        opened.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_curves_can_be_read_with_the_keyboard(opened, service):
    fill(service)
    opened.open().wait_live()
    assert "mean of 20 from" in opened.run("document.querySelector('#loss svg').getAttribute('aria-label')")
    opened.run("document.querySelector('#loss svg').focus()")
    opened.type("#loss svg", "\ue012")  # arrow left
    assert opened.all("#loss .legend li")[-1] == "step 840"
    opened.type("#loss svg", "\ue012")
    assert opened.all("#loss .legend li")[-1] == "step 830"


def test_the_page_is_delivered_without_a_key_and_nothing_else_is(service):
    from starlette.testclient import TestClient

    app = make_app(service, api_key="user-key")
    client = TestClient(app, follow_redirects=False)
    answer = client.get("/mezo/")
    assert answer.status_code == 200 and "tiny" not in answer.text
    assert (
        "default-src 'none'" in answer.headers["Content-Security-Policy"]
        and "unsafe" not in answer.headers["Content-Security-Policy"]
    )
    assert client.get("/mezo").headers["location"] == "mezo/"
    assert client.get("/mezo/?x=1").status_code == 200
    for path in (
        "/mezo/status",
        "/mezo//",
        "/mezo/%2e%2e/v1/files",
        "/mezo/%2e%2e/mezo/",
        "/MEZO/",
        "/v1/files",
        "/mezo/jobs/x/metrics",
    ):
        assert client.get(path, headers={"Host": "x/mezo/?"}).status_code == 401, path
    assert client.post("/mezo/").status_code == 401


def test_without_keys_the_page_is_an_ordinary_route(service):
    from starlette.testclient import TestClient

    client = TestClient(make_app(service))
    assert client.get("/mezo").status_code == client.head("/mezo/").status_code == 200
    assert "src=" not in client.get("/mezo/").text and "@import" not in client.get("/mezo/").text
