"""The page of `hf-rece demo` as people use it: in Chromium, by mouse and by keyboard."""

import re
import shutil

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from playwright.sync_api import expect, sync_playwright

from hf_rece import plan_losses
from hf_rece.losses.planning import human_bytes
from hf_rece.serving.demo import build_demo
from tests.serving.shop import HOSTILE, shop

# Gradio's queue counts its events with an option that pandas is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:'future.no_silent:DeprecationWarning")
PATIENCE = 60_000  # milliseconds: the machine may be busy
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SANDBOX = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    return path


@pytest.fixture(scope="module")
def model():
    return shop()


@pytest.fixture(scope="module")
def url(chromium, model):
    demo = build_demo(model, {"tool 1": "Hammer", "tool 11": "Claw hammer"})
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    yield url
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser(chromium, url):
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*SANDBOX, *QUIET])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """A visitor, who meets no error."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(url)
    yield page
    page.close()
    assert errors == []


def search(page):
    return page.get_by_label("Find one of 58 items")


def history(page):
    return page.get_by_role("list").filter(has=page.get_by_title("Remove")).get_by_role("listitem")


def recommended(page):
    return page.get_by_role("table", name="Recommended next").get_by_role("rowheader")


def answers(model, items, k=10, **limits):
    titles = {"tool 1": "Hammer (tool 1)", "tool 11": "Claw hammer (tool 11)"}
    (found,) = model.recommend([items], k, **limits)
    return [titles.get(answer.item, answer.item) for answer in found]


def test_a_history_by_mouse_and_keyboard_gets_the_models_answers(page, model):
    search(page).press_sequentially("hamm")
    expect(page.get_by_text("2 items match.")).to_be_visible()
    page.get_by_role("button", name="Claw hammer").click()
    expect(history(page)).to_have_text(["Claw hammer (tool 11)×"])
    search(page).press("Enter")
    expect(history(page)).to_have_text(["Claw hammer (tool 11)×", "Hammer (tool 1)×"])
    expect(search(page)).to_have_value("")
    expect(recommended(page)).to_have_text(answers(model, ["tool 11", "tool 1"]))
    page.get_by_role("button", name="Remove Claw hammer").press("Enter")
    expect(recommended(page)).to_have_text(answers(model, ["tool 1"]))
    page.get_by_role("button", name="Clear the history").click()
    expect(page.get_by_text("Add an item to the history.")).to_be_visible()


def test_a_recommendation_may_be_followed(page, model):
    page.get_by_role("button", name=HOSTILE[0]).click()
    first = answers(model, [HOSTILE[0]], 1)[0]
    page.get_by_role("button", name=f"Add {first} to the history").click()
    expect(history(page)).to_have_count(2)
    place = {"Hammer (tool 1)": "tool 1", "Claw hammer (tool 11)": "tool 11"}.get(first, first)
    expect(recommended(page)).to_have_text(answers(model, [HOSTILE[0], place]))


def test_as_many_are_recommended_as_asked_for_seen_ones_if_asked_for(page, model):
    search(page).fill("hammer")
    search(page).press("Enter")
    number = page.get_by_role("spinbutton", name="Items to recommend")
    number.fill("50")
    number.press("Tab")
    expect(recommended(page)).to_have_text(answers(model, ["tool 1"], 50))
    page.get_by_label("Leave out items of the history").uncheck()
    expect(recommended(page)).to_have_text(answers(model, ["tool 1"], 50, filter_seen=False))


def test_names_are_shown_and_never_run(page, model):
    matches = page.get_by_role("list").first
    for name in HOSTILE:
        matches.get_by_role("button", name=name, exact=False).filter(has_text=name).click()
    expect(history(page)).to_have_text([f"{name}×" for name in HOSTILE])
    page.get_by_label("Leave out items of the history").uncheck()
    number = page.get_by_role("spinbutton", name="Items to recommend")
    number.fill("50")
    number.press("Tab")
    expect(recommended(page)).to_have_text(answers(model, HOSTILE, 50, filter_seen=False))
    assert page.evaluate("window.broken") is None
    assert page.locator("img[src=x], svg[onload], [onmouseover], main b").count() == 0


def test_visitors_have_histories_of_their_own(page, browser, url):
    search(page).fill("hammer")
    search(page).press("Enter")
    expect(history(page)).to_have_count(1)
    other = browser.new_page()
    other.goto(url)
    expect(other.get_by_text("Add an item to the history.")).to_be_visible(timeout=PATIENCE)
    other.close()


def test_sliders_and_boxes_plan_the_losses(page):
    page.get_by_role("tab", name="Memory planner").click()
    classes = page.get_by_role("spinbutton", name="Classes")
    plan = page.get_by_role("table", name="Loss and backward")
    memory = plan.locator("td:first-of-type .number:first-child")

    def planned(n_classes, **limits):
        return [human_bytes(plan.bytes) for plan in plan_losses(4096, n_classes, 64, **limits)]

    expect(memory).to_have_text(planned(100_000))
    slider = page.get_by_role("slider", name="Classes")
    slider.press("ArrowRight")
    expect(classes).to_have_value("110000")
    expect(slider).to_have_attribute("aria-valuetext", "110000")
    expect(memory).to_have_text(planned(110_000))
    classes.fill("151936")
    expect(memory).to_have_text(planned(151_936))
    page.get_by_label("Keep to a memory budget").check()
    expect(memory).to_have_text(planned(151_936, memory_budget="64MiB"))
    page.get_by_role("spinbutton", name="Memory budget").fill("10")
    expect(page.get_by_role("alert")).to_contain_text("memory_budget='10MiB'")
    page.get_by_label("Keep to a memory budget").uncheck()
    expect(memory).to_have_text(planned(151_936))
    classes.fill("")
    expect(page.get_by_role("alert")).to_contain_text("classes=None")


def test_only_this_machine_is_asked_and_its_files_stay(page, url):
    addresses = []
    page.on("request", lambda request: addresses.append(request.url))
    page.reload()
    page.get_by_role("tab", name="Memory planner").click()
    expect(page.get_by_role("slider", name="Classes")).to_be_visible()
    assert all(address.startswith((url, "data:", "blob:")) for address in addresses)
    for path in ("/etc/passwd", __file__, "pyproject.toml"):
        assert page.request.get(f"{url}gradio_api/file={path}").status == 403


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling(browser, url, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
    page.goto(url)
    page.get_by_role("button", name=re.compile("tool 0|Hammer|img")).first.click(timeout=PATIENCE)
    expect(page.get_by_text("Score: the item's logit.")).to_be_visible()
    for tab in ("Recommend", "Memory planner"):
        page.get_by_role("tab", name=tab).click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, tab
    page.close()
