"""The playground page, driven in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from budgetformer.adoption.adding import add_classifier
from budgetformer.checkpoint.manifest import write_manifest
from budgetformer.checkpoint.store import read_checkpoint
from tests.support.classifiers import save_classifier
from tests.support.processes import Server, server
from tests.support.programs import program
from tests.support.stores import CHAINED, HEADS, LAYERS, labelled_sentences, sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

TEXT = sentences("music")[7]
WIDE, PHONE = (1240, 900), (360, 740)
KEEP_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", event =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`));
"""


@dataclass
class Visit:
    """An open page, and the errors that the browser reported."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)

    def card(self, letter: str) -> Locator:
        return self.page.locator(".answer").filter(
            has=self.page.locator(".badge", has_text=re.compile(f"^{letter}$"))
        )

    def slider(self, letter: str) -> Locator:
        return self.page.locator(f"#quality-{letter.lower()}")

    def type(self, text: str) -> None:
        """Enter a text, and wait for the answers at every stop of the slider."""
        self.page.fill("#text", text)
        self.page.press("#text", "Control+Enter")
        self.settled()

    def opened(self, url: str) -> None:
        """Go to a URL, and wait for the first answers."""
        self.page.goto(url)
        self.settled()

    def settled(self) -> None:
        """Wait until every stop of the slider has its answer."""
        expect(self.page.locator("#ticks span")).not_to_have_count(0)
        stops = self.page.locator("#ticks span").count()
        answered = self.page.locator("#columns .says:not(:empty)")
        expect(answered).to_have_count(stops, timeout=60_000)

    def forget_complaints(self, expected: str) -> None:
        """Remove the errors that a test has caused."""
        self.complaints = [said for said in self.complaints if not re.search(expected, said)]

    def lit(self, letter: str) -> list[list[int]]:
        """Return the highlighted heads by layer."""
        dots = (
            self.card(letter)
            .locator(".grid i")
            .evaluate_all("dots => dots.map(dot => dot.classList.contains('lit'))")
        )
        assert len(dots) == LAYERS * HEADS
        return [
            [head for head in range(HEADS) if dots[layer * HEADS + head]] for layer in range(LAYERS)
        ]

    def shown(self, letter: str, name: str) -> str:
        return self.card(letter).locator(f"[data-part={name}]").inner_text()

    def table(self) -> list[list[str]]:
        """Open the table, and return its rows."""
        self.page.locator("summary", has_text="as a table").click()
        return [
            row.locator("th, td").all_inner_texts()
            for row in self.page.locator("#table tbody tr").all()
        ]

    def ask(self, **body: Any) -> dict[str, Any]:
        """Return the server's answer, which the page should show."""
        answer = httpx.post(f"{self.url}/classify", json={"return_heads": True} | body, timeout=30)
        assert answer.status_code == 200
        return dict(answer.json()["data"][0])


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Open]:
    """Open pages of a server, and check at the end that the browser reported no error."""
    visits: list[Visit] = []

    def visit(size: tuple[int, int] = WIDE, wait: bool = True, **context: Any) -> Visit:
        viewport = {"width": size[0], "height": size[1]}
        opened = browser.new_context(viewport=viewport, **options | context)  # type: ignore[arg-type]
        opened.set_default_timeout(30_000)
        page = opened.new_page()
        visit = Visit(page, url)
        page.add_init_script(KEEP_VIOLATIONS)
        page.on("console", lambda said: said.type == "error" and visit.complaints.append(said.text))
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: asked.url.startswith(url) or visit.complaints.append(asked.url),
        )
        visits.append(visit)
        if wait:
            visit.opened(url)
        return visit

    yield visit
    for visit in visits:
        assert visit.page.evaluate("window.violations") == []
        assert visit.complaints == []
        visit.page.context.close()


@pytest.fixture
def visit(browser: Browser, running: Server) -> Iterator[Open]:
    with visiting(browser, running.url) as visit:
        yield visit


def test_the_page_shows_the_servers_answer(visit: Open) -> None:
    page = visit()
    page.type(TEXT)
    answer = page.ask(input=TEXT, quality="balanced")
    assert page.shown("A", "quality") == "balanced"
    assert page.shown("A", "label") == answer["label"]
    assert page.shown("A", "score") == f"{100 * answer['score']:.1f} %"
    bars = page.card("A").locator(".bars li").all_inner_texts()
    assert [bar.split()[0] for bar in bars] == [found["label"] for found in answer["labels"]]
    assert page.lit("A") == (answer["heads"]["per_layer"] or [[]] * LAYERS)
    figures = page.shown("A", "figures").split("\n")
    assert str(answer["heads"]["used"]) in figures
    assert str(answer["tokens"]) in figures


def test_the_page_shows_the_time_of_each_stage(visit: Open) -> None:
    page = visit()
    assert page.card("A").locator(".stages li span:first-child").all_inner_texts() == [
        "tokenize", "budget", "queue", "compute", "other",
    ]  # fmt: skip
    for duration in page.card("A").locator(".stages li span:last-child").all_inner_texts():
        assert re.fullmatch(r"[\d.]+ m?s", duration)


def test_typing_updates_the_answer(visit: Open) -> None:
    page = visit()
    others = {TEXT: "music", sentences("weather")[0]: "weather"}
    assert [page.ask(input=text)["label"] for text in others] == list(others.values())
    for text, label in others.items():
        page.page.locator("#text").clear()
        page.page.locator("#text").press_sequentially(text)
        expect(page.card("A").locator("[data-part=label]")).to_have_text(label)
        expect(page.page.get_by_role("status")).to_contain_text(label)


def test_the_slider_can_be_moved_by_keyboard(visit: Open) -> None:
    page = visit()
    page.type(TEXT)
    slider = page.slider("A")
    slider.focus()
    seen = {}
    for key, name in (("Home", "fast"), ("End", "every head")):
        slider.press(key)
        assert page.shown("A", "quality") == name
        assert (slider.get_attribute("aria-valuetext") or "").startswith(f"{name}. On average")
        seen[name] = page.lit("A")
    assert seen["fast"] == [[]] * LAYERS
    assert seen["every head"] == [list(range(HEADS))] * LAYERS
    slider.press("Home")
    slider.press("ArrowRight")
    assert page.shown("A", "quality") == page.table()[1][0]


def test_the_table_shows_the_answer_at_every_stop(visit: Open) -> None:
    page = visit()
    page.type(TEXT)
    rows = page.table()
    assert [row[0] for row in rows] == [
        "fast", "balanced", "1.00 points given up", "best", "every head",
    ]  # fmt: skip
    fields: list[dict[str, Any]] = [{"quality": name} for name in ("fast", "balanced", 1.0, "best")]
    for row, asked in zip(rows, [*fields, {"heads": HEADS}], strict=True):
        answer = page.ask(input=TEXT, **asked)
        assert row[1] == answer["label"]
        assert row[3] == ", ".join(map(str, answer["heads"]["steps"]))
        assert row[4] == f"{answer['heads']['used']} of {LAYERS * HEADS}"
        share = answer["macs"] / answer["dense_macs"]
        assert row[5] in (f"{100 * share:.1f} %", "< 0.1 %")


def test_two_qualities_can_be_compared(visit: Open) -> None:
    page = visit()
    page.type(TEXT)
    page.page.get_by_role("button", name="Compare two").click()
    page.slider("A").press("Home")
    page.slider("B").press("End")
    assert page.lit("A") == [[]] * LAYERS
    assert page.lit("B") == [list(range(HEADS))] * LAYERS
    less, more = page.ask(input=TEXT, quality="fast"), page.ask(input=TEXT, heads=HEADS)
    versus = page.page.locator("#versus").inner_text()
    times = more["macs"] / less["macs"]
    assert versus.startswith(f"B takes {times:.1f}" if times < 100 else f"B takes {times:,.0f}")
    page.page.get_by_role("button", name="Compare two").click()
    expect(page.page.locator(".answer")).to_have_count(1)
    expect(page.page.locator("#versus")).to_be_hidden()


def test_another_model_can_be_selected(visit: Open) -> None:
    page = visit()
    page.type(TEXT)
    page.page.select_option("#model", "tags")
    expect(page.page.locator("#live-state")).to_contain_text("tags")
    page.settled()
    page.slider("A").press("End")
    answer = page.ask(input=TEXT, model="tags", heads=HEADS)
    bars = page.card("A").locator(".bars li").all_inner_texts()
    assert [bar.split() for bar in bars] == [
        [found["label"], f"{100 * found['score']:.1f}", "%"] for found in answer["labels"]
    ]


def test_a_chain_shows_the_steps_of_a_text(visit: Open) -> None:
    page = visit()
    expect(page.page.locator("#chain")).to_be_empty()
    expect(page.page.locator("#measure")).to_contain_text("Accuracy is the share of")
    page.page.select_option("#model", CHAINED)
    expect(page.page.locator("#live-state")).to_contain_text(CHAINED)
    expect(page.page.locator("#chain")).to_contain_text("Steps 0 → 1 → 2: a text stops at")
    expect(page.page.locator("#measure")).to_contain_text("answers as every head would")
    text = next(
        text
        for text, _ in labelled_sentences()
        if page.ask(input=text, model=CHAINED, quality="best")["heads"]["steps"] == [0, 1, 2]
    )
    page.type(text)
    slider = page.slider("A")
    slider.press("Home")
    for name in ("fast", "balanced", "1.00 points given up", "best"):
        assert page.shown("A", "quality") == name
        assert "On average the same answer as every head on" in page.shown("A", "expected")
        quality = 1.0 if name.startswith("1.00") else name
        heads = page.ask(input=text, model=CHAINED, quality=quality)["heads"]
        way = page.card("A").locator(".way li")
        assert way.all_inner_texts() == ["0", "1", "2"]
        ran = page.card("A").locator(".way .ran").all_inner_texts()
        assert ran == [str(step) for step in heads["steps"]]
        predicted = page.card("A").locator(".way .predicted").all_inner_texts()
        assert predicted == [str(heads["predicted"])]
        slider.press("ArrowRight")
    slider.press("ArrowLeft")
    assert page.shown("A", "steps") == "f_o predicted step 1; steps 0, 1 and 2 ran"
    assert "after 2 in earlier steps" in page.shown("A", "caption")
    slider.press("End")
    assert page.shown("A", "steps") == f"As asked, step {HEADS} ran"
    assert "the same answer as every head on 100.0 % of the" in page.shown("A", "expected")
    assert _axe(page) == []


def test_a_model_without_calibration_offers_its_steps(
    browser: Browser, model_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(model_store / "picky", store / "picky")
    manifest = read_checkpoint(store / "picky" / "1").manifest
    write_manifest(
        store / "picky" / "1", manifest.model_copy(update={"policy": None, "operating_points": ()})
    )
    with server(store, tmp_path, engines=1) as own, visiting(browser, own.url) as visit:
        page = visit()
        assert [row[0] for row in page.table()] == ["step 1", "step 2", "step 3", "every head"]
        page.type(TEXT)
        assert page.lit("A") == page.ask(input=TEXT, heads=1)["heads"]["per_layer"]
        assert [len(layer) for layer in page.lit("A")] == [1] * LAYERS


def test_a_classifier_served_as_it_is_answers_at_every_stop(
    browser: Browser, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    theirs = save_classifier(tmp_path / "theirs", num_hidden_layers=LAYERS)
    made = add_classifier(theirs, store, lambda _: None)
    with server(store, tmp_path, engines=1) as own, visiting(browser, own.url) as visit:
        page = visit()
        page.type(TEXT)
        every = [list(range(made.num_heads))] * made.num_layers
        for key in ("Home", "End"):
            page.slider("A").press(key)
            page.settled()
            assert page.lit("A") == every
        assert page.shown("A", "quality") == "every head"


def test_the_live_strip_shows_the_traffic_of_others(visit: Open) -> None:
    page = visit()
    many = sentences("animals") * 30
    assert httpx.post(f"{page.url}/classify", json={"input": many}, timeout=60).is_success

    def texts() -> int:
        shown = page.page.locator("#live-figures dd").first.inner_text()
        return 0 if shown == "–" else int(shown.replace(",", ""))

    wait_until(lambda: texts() >= len(many), "the texts in the strip")
    expect(page.page.locator("#live-budgets rect")).not_to_have_count(0)
    told = page.page.locator("#live-budgets").get_attribute("aria-label") or ""
    assert sum(map(int, re.findall(r"(\d+) at step", told))) == texts()
    expect(page.page.locator("#live-latency")).to_have_attribute(
        "aria-label", re.compile("median of")
    )


def test_a_file_can_be_submitted_followed_and_downloaded(
    browser: Browser, model_store: Path, tmp_path: Path
) -> None:
    rows = [f"{text} {i}" for i, (text, _) in enumerate(labelled_sentences() * 20)]
    file = {"mimeType": "application/x-ndjson", "name": "texts.jsonl"}
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)
    options = {"default_model": CHAINED, "state_dir": str(tmp_path / "state")}
    with (
        server(model_store, tmp_path, engines=1, **options) as serving,
        visiting(browser, serving.url) as visit,
    ):
        visited = visit()
        page = visited.page
        state = page.locator("#job-state")
        page.set_input_files("#job-file", {**file, "name": "texts.xlsx", "buffer": b"x"})  # type: ignore[arg-type]
        page.click("#job-send")
        expect(state).to_contain_text("CSV, JSONL or Parquet")
        page.set_input_files("#job-file", {**file, "buffer": content})  # type: ignore[arg-type]
        page.click("#job-send")
        expect(state).to_have_text("Finished.", timeout=60_000)
        expect(page.locator("#job-figures")).to_contain_text(f"{len(rows):,}")
        assert _axe(visited) == []
        with page.expect_download() as downloading:
            page.click("#job-save")
        answers = Path(downloading.value.path()).read_text().splitlines()
        assert [json.loads(line)["text"] for line in answers] == rows
        page.click("#job-cancel")
        expect(state).to_have_text("Removed.")
        assert httpx.get(f"{serving.url}/jobs").json()["data"] == []
        broken = {**file, "buffer": b'{"no": "text"}\n'}
        page.set_input_files("#job-file", broken)  # type: ignore[arg-type]
        page.click("#job-send")
        expect(state).to_contain_text("Failed: input.jsonl, row 1", timeout=60_000)


def test_refusals_of_the_server_are_shown(visit: Open) -> None:
    page = visit()
    page.page.fill("#text", "x" * 100_001)
    problem = page.page.locator("#problem")
    expect(problem.get_by_role("alert")).to_contain_text("100001 characters, at most 100000 are")
    expect(problem).to_contain_text("field input[0]")
    page.forget_complaints("422")
    page.type(TEXT)
    expect(problem).to_be_hidden()


def test_the_page_retries_and_reports_an_unreachable_server(
    browser: Browser, model_store: Path, tmp_path: Path
) -> None:
    with visiting(browser, "http://127.0.0.1") as visit:
        page = visit(wait=False)
        problem = page.page.locator("#problem")
        with server(model_store, tmp_path, engines=1, default_model="topics") as own:
            page.opened(own.url)
            supervisor = psutil.Process(own.process.pid)
            engines = own.engines()
            supervisor.suspend()  # so that it does not restart engines
            for pid in engines.values():
                psutil.Process(pid).kill()
            wait_until(lambda: not own.ready(), "the loss of readiness")
            page.page.fill("#text", TEXT)
            page.page.press("#text", "Control+Enter")
            expect(problem).to_contain_text("Asking again in")
            supervisor.resume()
            page.settled()
            expect(problem).to_be_hidden()
        page.page.fill("#text", TEXT + "!")
        expect(problem).to_contain_text("The server cannot be reached")
        page.forget_complaints("503|ERR_CONNECTION_REFUSED")


def test_a_field_for_the_key_appears_if_one_is_required(visit: Open) -> None:
    """A gate in front of the server requires the key, like a proxy."""
    page = visit(wait=False)

    def gate(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            error = {"message": "a key, please", "type": "unauthorized", "param": None, "code": "x"}
            route.fulfill(status=401, json={"error": error})

    page.page.route(re.compile("/(classify|v1|models|playground/recent)"), gate)
    page.page.goto(page.url)
    expect(page.page.locator("#problem")).to_contain_text("a key, please")
    expect(page.page.get_by_label("API key")).to_be_focused()
    page.page.keyboard.type("sesame")
    page.page.keyboard.press("Enter")
    page.settled()
    expect(page.page.locator("#problem")).to_be_hidden()
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert "sesame" not in page.page.evaluate(kept)
    page.forget_complaints("401")


def test_every_control_can_be_reached_by_keyboard(visit: Open) -> None:
    page = visit()
    keyboard = page.page.keyboard
    name = "document.activeElement.id || document.activeElement.textContent.trim()"
    reached = []
    while not reached or reached[-1] != "The same as a table":
        keyboard.press("Tab")
        reached.append(page.page.evaluate(name))
        assert len(reached) < 30
    examples = page.page.locator("#examples button").all_inner_texts()
    assert reached == [
        "Skip to the text", "API", "Metrics", "Key", "text", *examples, "model", "Classify",
        "compare", "quality-a", "The same as a table",
    ]  # fmt: skip
    page.page.get_by_text("Skip to the text").focus()
    keyboard.press("Enter")
    expect(page.page.locator("#text")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_no_violation(visit: Open, scheme: str, size: tuple[int, int]) -> None:
    page = visit(size, color_scheme=scheme, reduced_motion="reduce")
    page.type(TEXT)
    assert _axe(page) == []
    page.page.get_by_role("button", name="Compare two").click()
    page.table()
    page.page.get_by_text("Key", exact=True).click()
    assert _axe(page) == []
    page.page.fill("#text", "x" * 100_001)
    expect(page.page.locator("#problem")).to_be_visible()
    page.forget_complaints("422")
    assert _axe(page) == []


def _axe(page: Visit) -> list[str]:
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = Axe().run(page.page, options=rules).response
    assert found["passes"]
    return [
        f"{violation['id']}: {node['html']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]


def test_the_page_follows_the_preferred_color_scheme(visit: Open) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).page
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        brightness[scheme] = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
        assert len(page.screenshot()) > 10_000
    assert brightness["dark"] < 40 < 215 < brightness["light"]


@pytest.mark.parametrize("width", [320, 390, 768])
def test_the_page_fits_small_screens(visit: Open, width: int) -> None:
    page = visit((width, 740))
    page.page.get_by_role("button", name="Compare two").click()
    page.table()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_has_no_transitions_with_reduced_motion(visit: Open) -> None:
    page = visit(reduced_motion="reduce")
    moving = page.page.locator("body *").evaluate_all(
        "all => all.filter(it => getComputedStyle(it).transitionDuration !== '0s').length"
    )
    assert moving == 0
