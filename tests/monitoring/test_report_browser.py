"""Pages in Chromium: they render, ask for nothing, fit phones and screens, and are accessible in light and dark."""

import shutil

import pytest

from bootgrad.monitoring.report import write_report

from .folders import HOSTILE, compare_folder, experiment_folder, monitor_folder, narrow_folder, train_folder

pytestmark = pytest.mark.slow

PHONE, LARGER, DESKTOP = (
    {"width": 360, "height": 740},
    {"width": 390, "height": 844},
    {"width": 1280, "height": 900},
)
FOLDERS = {
    "train": lambda path: monitor_folder(train_folder(path), layer=HOSTILE, sample=HOSTILE),
    "compare": compare_folder,
    "experiment": lambda path: experiment_folder(path, text=HOSTILE),
    "monitor": lambda path: monitor_folder(path, layer=".".join(["a_rather_long_name"] * 6)),
    "narrow": narrow_folder,
}


# what is not wholly in sight, and in nothing that is scrolled to it by keyboard and has a name
CUT = """() => {
  const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth;
  const named = e => e.tabIndex === 0 && e.getAttribute('role') === 'region'
    && document.getElementById(e.getAttribute('aria-labelledby'))?.textContent.trim();
  const within = e => { for (let up = e.parentElement; up; up = up.parentElement) if (scrolls(up)) return named(up); };
  const cut = e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    || (/hidden|clip/.test(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth);
  return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg, .hidden') && cut(e) && !within(e))
    .map(e => e.outerHTML.slice(0, 200));
}"""
# labels of axes that are beyond their figure, or that lie over a neighbour
COVERED = """() => [...document.querySelectorAll('.ys, .xs')].flatMap(axis => {
  const boxes = [...axis.children].map(e => e.getBoundingClientRect()), all = axis.closest('figure').getBoundingClientRect();
  const beyond = boxes.filter(b => b.left < all.left || b.right > all.right + 1);
  const over = boxes.slice(1).filter((b, k) => { const a = boxes[k];
    return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom; });
  return [...beyond, ...over].map(b => axis.className + ' of ' + axis.closest('figure').getAttribute('aria-labelledby'));
})"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """The pages' addresses by kind."""
    return {kind: write_report(make(tmp_path_factory.mktemp(kind) / "run")).as_uri() for kind, make in FOLDERS.items()}


@pytest.fixture
def visit(browser, addresses):
    """A function that opens a page of a kind, by a viewport and a colour scheme, and keeps what it says and asks for."""
    contexts = []

    def visit(kind, viewport=DESKTOP, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.messages, page.asked = [], []
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("dialog", lambda dialog: (page.messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(addresses[kind])
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize("viewport", [PHONE, LARGER, DESKTOP], ids=["360", "390", "1280"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_page_renders_from_itself_alone_and_fits(visit, addresses, kind, viewport):
    page = visit(kind, viewport)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.messages == []
    assert [url for url in page.asked if not url.startswith("data:")] == [addresses[kind]]
    width, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= room
    for box in page.locator(".box svg").all():
        size = box.bounding_box()
        assert size["width"] > 150 and size["height"] > 100
    assert page.evaluate(CUT) == []
    assert page.evaluate(COVERED) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_page_is_accessible(visit, kind, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(kind, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    # axe is a script, which the page's own policy forbids: it comes past it, as an extension would
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert {rule["id"] for rule in found.response["passes"]} >= {"color-contrast", "html-has-lang", "document-title"}


def test_light_and_dark_differ(visit):
    ground = [
        visit("train", scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert ground == ["rgb(246, 247, 249)", "rgb(16, 21, 28)"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_have_contrast(visit, scheme):
    """Three to one with what is behind, as WCAG asks of graphics."""
    page = visit("compare", scheme=scheme)
    behind = page.evaluate("getComputedStyle(document.querySelector('.chart')).backgroundColor")
    for k in range(5):
        colour = page.evaluate(
            f"(() => {{ const e = document.querySelector('path').cloneNode(); e.setAttribute('class', 'line c{k}');"
            "document.querySelector('.box svg').append(e); return getComputedStyle(e).stroke; })()"
        )
        assert contrast(colour, behind) >= 3, (k, colour, behind)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_have_contrast(visit, scheme):
    """Which axe does not judge: shadows at their edges tell that there is more."""
    page = visit("train", PHONE, scheme=scheme)
    ground, shadows = page.evaluate(
        "(s => [s.backgroundColor, s.backgroundImage])(getComputedStyle(document.querySelector('.scroll')))"
    )
    assert shadows.count("gradient") == 4
    found = page.locator(".scroll :is(caption, th, td)").evaluate_all("all => all.map(e => getComputedStyle(e).color)")
    assert len(found) > 50 and all(contrast(colour, ground) >= 4.5 for colour in set(found))


def contrast(a, b):
    """Of two colours ``rgb(r, g, b)``: the ratio of their luminances, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_all_is_reached_by_keyboard(visit):
    page = visit("train", PHONE)
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.className")
    assert first == "skip" and page.locator(".skip").bounding_box()["y"] >= 0  # it comes into sight
    page.keyboard.press("Enter")
    assert page.url.endswith("#content") and page.evaluate("document.activeElement.id") == "content"
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.getAttribute('aria-labelledby') || document.activeElement.tagName, "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name == "BODY":
            break
        assert outline == "solid", name
        reached.append(name)
    tables = page.locator(".scroll").evaluate_all(
        "all => all.filter(e => !e.closest('details')).map(e => e.getAttribute('aria-labelledby'))"
    )
    assert len(tables) >= 4 and set(tables) <= set(reached)
    assert reached.count("SUMMARY") == page.locator("summary").count()
    wide = page.locator("[aria-labelledby=epochs-table-caption]")
    wide.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # the page's policy lets nothing wait inside of it
        page.wait_for_timeout(20)
        if page.evaluate("document.activeElement.scrollLeft") > 0:
            break
    assert page.evaluate("document.activeElement.scrollLeft") > 0


def test_names_from_outside_do_nothing(visit):
    page = visit("train")
    assert page.messages == [] and page.locator("script, b").count() == 0
    assert page.get_by_text("<script>alert(1)</script>").count() >= 2
