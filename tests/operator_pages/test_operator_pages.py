"""The operators' pages in a real Chromium, on a real server with a real federation."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from blindsum.client.testing import Federation, small_model
from blindsum.proto.v1 import enrolment_pb2, enrolment_pb2_grpc

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt install chromium")

SECRET_WORDS = ("0.7342", "4711")
"""A metric and an example count that members submit: nothing of them may reach a page."""


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """One finished round, and a second one that waits for the last member's upload."""
    with Federation(
        ["hospital", "clinic-1", "clinic-2"],
        model=small_model(),
        rounds=2,
        metrics={"accuracy": (0.0, 1.0)},
        plan={"max_examples": 5000},
        server_settings={"admin_port": 0},
    ) as found:
        running, go_on = threading.Event(), threading.Event()

        def app(member):
            for rnd in member.rounds():
                if rnd.index == 2 and member.name == "clinic-2":
                    running.set()
                    go_on.wait(60)
                rnd.submit(rnd.weights(), examples=4711, metrics={"accuracy": 0.7342})
            return len(member.receipts())

        results = {}
        work = threading.Thread(target=lambda: results.update(found.run(app)))
        work.start()
        assert running.wait(60)
        found.go_on, found.work, found.results = go_on, work, results
        yield found
        go_on.set()
        work.join(60)
    assert results == {"hospital": 2, "clinic-1": 2, "clinic-2": 2}


def address_of(federation: Federation) -> str:
    return f"http://127.0.0.1:{federation.server.server.admin_port}"


def token_of(federation: Federation) -> str:
    return (federation.folder / "server" / "admin.token").read_text().strip()


def signed_in(browser, federation: Federation, **options):
    """A page after the login form, with what went wrong in it and what it asked other hosts for."""
    page = browser.new_context(**options).new_page()
    page.faults = []
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    own = address_of(federation)
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((own, "data:")) else page.faults.append(sent.url),
    )
    page.goto(own)
    assert page.url == f"{own}/login"
    page.get_by_label("Admin token").fill(token_of(federation))
    page.keyboard.press("Enter")
    page.wait_for_url(f"{own}/")
    return page


def keep_picture(page, name: str) -> None:
    """Screenshots go where SCREENSHOTS says, for eyes."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_wrong_token_opens_nothing(browser, federation):
    page = browser.new_page()
    page.goto(address_of(federation))
    page.get_by_label("Admin token").fill("0" * 64)
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert "isn't the admin token" in page.get_by_role("alert").inner_text()
    keep_picture(page, "login")
    answer = page.goto(f"{address_of(federation)}/federations/{federation.owner.federation.id.hex()}")
    assert answer.url.endswith("/login")
    page.close()


def test_the_running_round_is_shown_and_goes_on_live(browser, federation):
    page = signed_in(browser, federation)
    card = page.get_by_role("listitem").filter(has_text="masking")
    card.get_by_text("3 of 3 connected").wait_for()
    keep_picture(page, "overview")
    card.get_by_role("link").click()
    page.get_by_role("heading", name="Running round").wait_for()
    page.locator("li[aria-current=step]", has_text="upload").wait_for()
    page.get_by_text("Still to reply: clinic-2.").wait_for()
    assert page.get_by_role("row", name="hospital").get_by_text("ready").count() == 1
    history = page.locator("section", has=page.get_by_role("heading", name="Rounds", exact=True))
    assert history.get_by_text("concluded").count() == 1
    keep_picture(page, "federation")
    for word in SECRET_WORDS:
        assert word not in page.content()
    assert "sealed to the" in page.get_by_role("region", name="What this page can't show").inner_text()

    federation.go_on.set()
    federation.work.join(60)
    history.get_by_text("concluded").nth(1).wait_for()
    page.get_by_text("2 of 2 rounds of the plan are done.").wait_for()
    assert page.faults == []
    page.close()


def test_a_refused_call_is_listed_with_its_reason(browser, federation):
    channel = grpc.secure_channel(
        f"localhost:{federation.server.enrolment_port}",
        grpc.ssl_channel_credentials(federation.server.ca_pem),
    )
    with channel, pytest.raises(grpc.RpcError):
        enrolment_pb2_grpc.EnrolmentServiceStub(channel).PollJoin(
            enrolment_pb2.PollJoinRequest(federation=federation.owner.federation.id, request_id=bytes(16))
        )
    page = signed_in(browser, federation)
    page.goto(f"{address_of(federation)}/federations/{federation.owner.federation.id.hex()}")
    refusals = page.locator("section", has=page.get_by_role("heading", name="Refusals"))
    refusals.get_by_text("PollJoin").first.wait_for()
    assert page.faults == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_colour_schemes(browser, federation, scheme):
    page = signed_in(browser, federation, color_scheme=scheme, viewport={"width": 1100, "height": 900})
    page.get_by_role("listitem").get_by_role("link").click()
    page.get_by_role("heading", name="Members").wait_for()
    keep_picture(page, f"federation-{scheme}")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 20
    assert min(ratios) >= 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background[4:-1].split(",")) > 384) == (scheme == "light")
    page.close()


def test_everything_is_reached_by_keyboard(browser, federation):
    page = signed_in(browser, federation, viewport={"width": 480, "height": 800})
    page.goto(f"{address_of(federation)}/federations/{federation.owner.federation.id.hex()}")
    page.get_by_role("heading", name="Members").wait_for()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
    assert reached[0] == "Skip to content"
    assert any("Sign out" in text for text in reached)
    tables = page.locator(".scroll").count()
    assert sum(text.startswith(("Member", "Round", "When", "No.")) for text in reached) == tables
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "the page itself never scrolls sideways"
    )
    page.close()


def test_signing_out_ends_the_session(browser, federation):
    page = signed_in(browser, federation)
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/login")
    page.goto(address_of(federation))
    assert page.url.endswith("/login")
    page.close()


CONTRAST = """
() => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const ratios = [];
  for (const node of document.querySelectorAll("main *, header *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility()) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
    ratios.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return ratios;
}
"""
