"""The page /mezo/ in headless Chromium, on the real routes and a real store: no engine is needed to look at jobs."""

import pytest

from browser import ATTACKS, TOO_FAINT, add_event, add_job, chromium, fill, make_app, opened, service, train  # noqa: F401
from sglang.srt.mezo.service.wire.errors import RequestError


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
