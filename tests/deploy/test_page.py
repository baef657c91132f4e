"""The page that generates in a browser: its text, and in headless Chromium what it does."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advkd.config import StudentConfig
from advkd.deploy import page as pages
from advkd.deploy.model_file import model_bytes
from advkd.deploy.page import page
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.ops import extension
from advkd.pretrained import load_student
from advkd.report.page import write_report
from advkd.report.pictures import Pictures, image_grid

pytestmark = pytest.mark.skipif(extension is None, reason="the C++ extension is not installed")

ZOO = "zoo:fashion-mnist-student"
NASTY = "</script><script>alert(\"x\")</script> & 'quotes' <!--"
MOST_BYTES = 2_000_000  # of the page of the student that ships
PATIENCE = 60  # seconds that the browser has, on a loaded machine


def small_student(class_names: tuple[str, ...] | None = None, **changes: Any) -> Student:
    """A student of 8×8 pixels whose weights are noise."""
    torch.manual_seed(0)
    config = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4)
    settings = {"target": "denoised", **changes}
    classes = None if class_names is None else len(class_names)
    student = Student(config, 8, settings.pop("channels", 1), num_classes=classes, **settings)
    student.class_names = class_names
    return student.eval()


@pytest.fixture(scope="module")
def shipped() -> Student:
    return load_student(ZOO)


@pytest.fixture(scope="module")
def shipped_file(shipped: Student) -> bytes:
    return model_bytes(shipped)


# The text.


class Parsed(HTMLParser):
    """The tags of a page with their attributes, its visible text, and its scripts by type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", dict[str, str]()
        self._into: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._into = str(dict(attrs).get("id") or dict(attrs)["type"])

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is None:
            self.text += data
        else:
            self.scripts[self._into] = self.scripts.get(self._into, "") + data


def policy_of(parsed: Parsed) -> str:
    (policy,) = [
        attributes["content"]
        for _, attributes in parsed.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    return policy


def test_the_page_loads_nothing(shipped_file: bytes) -> None:
    text = page(shipped_file, "Fashion")
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", text)
    assert "{{" not in text and "{%" not in text
    parsed = Parsed(text)
    links = {a.get("href") or a.get("src") for _, a in parsed.tags if "href" in a or "src" in a}
    assert links == {"data:,"}  # the icon that browsers otherwise ask for
    assert policy_of(parsed).startswith("default-src 'none'; img-src data:;")


def test_the_page_of_the_student_that_ships_is_small(shipped_file: bytes) -> None:
    assert len(page(shipped_file, "Fashion", ZOO).encode()) <= MOST_BYTES


def test_only_the_pages_own_script_may_run(shipped_file: bytes) -> None:
    parsed = Parsed(page(shipped_file, "Fashion"))
    own = base64.b64encode(hashlib.sha256(parsed.scripts["module"].encode()).digest()).decode()
    assert f"script-src 'sha256-{own}' 'wasm-unsafe-eval';" in policy_of(parsed)
    assert "unsafe-inline" not in policy_of(parsed).split("script-src")[1]
    assert set(parsed.scripts) == {"try-library", "try-model", "try-worker", "module"}
    assert not re.search("^(export|import)", parsed.scripts["try-worker"], re.MULTILINE)


def test_titles_and_commands_are_escaped() -> None:
    names = (NASTY, "bag")
    parsed = Parsed(page(model_bytes(small_student(names)), NASTY, f"runs/{NASTY}"))
    assert len(parsed.scripts) == 4
    assert parsed.text.count('alert("x")') == 3  # title, heading, command
    assert "--student 'runs/" in parsed.text


def test_a_page_is_the_same_bytes_each_time(shipped_file: bytes) -> None:
    assert page(shipped_file, "Fashion") == page(shipped_file, "Fashion")


# In a browser.


class Shown:
    """A page in the browser."""

    def __init__(self, driver: Any, path: Path):
        self.driver, self.path = driver, path
        driver.get_log("browser"), driver.get_log("performance")  # what earlier pages left
        driver.get(path.as_uri())

    def part(self, name: str) -> Any:
        return self.driver.find_element("id", f"try-{name}")

    def status(self) -> str:
        return str(self.part("status").text).replace("\u00a0", " ")

    def until(self, pattern: str) -> str:
        """Wait until the status line fits a pattern, and return it."""
        ends = time.monotonic() + PATIENCE
        while not re.search(pattern, self.status()):
            assert time.monotonic() < ends, f"the page says {self.status()!r}, not {pattern!r}"
            time.sleep(0.02)
        return self.status()

    def choose(self, seed: int = 0, label: int | None = None, head: int | None = None) -> str:
        """Choose by the controls, wait for the images, and return what the page says of them."""
        self.set("seed", str(seed), "input")
        if label is not None:
            self.set("class", str(label), "change")
        if head is not None:
            self.set("head", str(head), "input")
        name = "" if label is None else re.escape(self.option(label))
        return self.until(f"of seed {seed}, .*{name}.* each")

    def set(self, name: str, value: str, event: str) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('%s'))"
        self.driver.execute_script(script % event, self.part(name), value)

    def option(self, label: int) -> str:
        options = self.part("class").find_elements("tag name", "option")
        return str(options[label + 1].get_property("text"))

    def grid(self) -> np.ndarray:
        """The grid's pixels, uint8 (side, side, 3)."""
        url = self.driver.execute_script("return arguments[0].toDataURL()", self.part("grid"))
        with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
            return np.asarray(image.convert("RGB"))

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """The schemes of everything that the page asked for."""
        events = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == REQUEST]
        assert sent, "the browser keeps no record of requests"
        return {url.split(":")[0] for url in sent}


REQUEST = "Network.requestWillBeSent"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1100,900",
)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads: Path) -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install it")
    found = [shutil.which(name) for name in ("chromium", "google-chrome", "chrome")]
    binary, service = next(filter(None, found), None), shutil.which("chromedriver")
    if binary is None or service is None:
        pytest.skip("needs Chromium and chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def shown(driver: Any, shipped_file: bytes, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The page of the student that ships. Tests leave it with whatever they have chosen."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(shipped_file, "Fashion-MNIST", ZOO), encoding="utf-8")
    return Shown(driver, path)


@pytest.fixture
def fresh(shown: Shown) -> Shown:
    """The same, newly opened and with its first images."""
    opened = Shown(shown.driver, shown.path)
    opened.until("each")
    return opened


def opened(driver: Any, folder: Path, model_file: bytes) -> Shown:
    path = folder / "page.html"
    path.write_text(page(model_file, "A page"), encoding="utf-8")
    return Shown(driver, path)


def expected(student: Student, seed: int, label: int | None, head: int | None) -> np.ndarray:
    """The grid that the Python package makes, uint8 (side, side, 3)."""
    y = None if label is None else torch.full((64,), label)
    images = generate(student, 64, seed, y=y, exit_at=head)
    grid = image_grid(images, 8, student.size // images.shape[-1])
    return grid if grid.ndim == 3 else np.repeat(grid[:, :, None], 3, axis=2)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_a_page_in_a_file_generates_without_a_request(fresh: Shown) -> None:
    said = fresh.until("each")
    assert re.fullmatch(r"64 images of seed 0, all classes, 28×28 pixels, [\d.]+ ms each\.", said)
    assert float(fresh.part("ms").text) > 0
    assert fresh.requests() <= {"file", "blob", "data"}
    assert fresh.console() == []


@pytest.mark.parametrize(
    ("seed", "label", "head"),
    [(0, None, 3), (1, None, 3), (2**64 - 1, 5, 3), (12, 0, 3), (3, None, 2), (4, 9, 1)],
)
def test_images_are_those_of_the_package(
    fresh: Shown, shipped: Student, seed: int, label: int | None, head: int
) -> None:
    said = fresh.choose(seed, label, head)
    side = 7 * 2 ** (head - 1)
    said = fresh.until(f"{side}×{side} pixels")
    assert shipped.class_names is not None
    assert ("all classes" if label is None else shipped.class_names[label]) in said
    assert difference(fresh.grid(), expected(shipped, seed, label, head)) <= 1


def test_another_is_the_next_seed(fresh: Shown) -> None:
    before = fresh.grid()
    fresh.part("next").click()
    fresh.until("of seed 1,.* each")
    assert fresh.part("seed").get_property("value") == "1"
    assert difference(before, fresh.grid()) > 50
    fresh.choose(2**64 - 1)
    fresh.part("next").click()
    fresh.until("of seed 0,.* each")
    assert difference(before, fresh.grid()) == 0


@pytest.mark.parametrize("seed", ["", "-1", "1.5", "x", str(2**64)])
def test_a_seed_that_is_none_is_explained(fresh: Shown, seed: str) -> None:
    before = fresh.grid()
    fresh.set("seed", seed, "input")
    assert fresh.status() == f"A seed is a whole number from 0 to {2**64 - 1}."
    assert fresh.part("seed").get_attribute("aria-invalid") == "true"
    assert difference(before, fresh.grid()) == 0
    fresh.choose(0)
    assert fresh.part("seed").get_attribute("aria-invalid") == "false"


def test_only_the_newest_choice_is_shown(fresh: Shown, shipped: Student) -> None:
    for seed in range(1, 8):
        fresh.set("seed", str(seed), "input")
    fresh.until("of seed 7,.* each")
    time.sleep(0.2)
    assert "of seed 7," in fresh.status()
    assert difference(fresh.grid(), expected(shipped, 7, None, 3)) <= 1


def test_the_command_makes_the_same_images(fresh: Shown) -> None:
    command = f"advkd sample --student {ZOO} --seed"
    assert fresh.part("command").text == f"{command} 0"
    fresh.choose(7, 5, 2)
    assert fresh.part("command").text == f"{command} 7 --class sandal --exit-at 2"
    fresh.choose(7, 9, 3)  # a name of two words would need quotes
    assert fresh.part("command").text == f"{command} 7 --class 9"


def test_the_png_is_that_of_the_command(fresh: Shown, shipped: Student, downloads: Path) -> None:
    fresh.choose(21)
    fresh.part("save").click()
    file, ends = downloads / "seed-21.png", time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < ends
        time.sleep(0.05)
    with Image.open(file) as image:
        saved = np.asarray(image.convert("RGB"))
    wanted = expected(shipped, 21, None, None).repeat(2, axis=0).repeat(2, axis=1)
    assert difference(saved, wanted) <= 1


def test_controls_have_names_and_are_reached_by_keyboard(fresh: Shown) -> None:
    from selenium.webdriver.common.keys import Keys

    names = {
        "seed": ("textbox", "Seed"),
        "next": ("button", "Another: the next seed"),
        "class": ("combobox", "Class"),
        "head": ("slider", "Watch it sharpen"),
        "save": ("button", "Download as PNG"),
    }
    focus, reached = fresh.driver.switch_to.active_element, []
    for name, (role, label) in names.items():
        focus.send_keys(Keys.TAB)
        focus = fresh.driver.switch_to.active_element
        reached.append(focus.get_attribute("id").removeprefix("try-"))
        assert (focus.aria_role, focus.accessible_name) == (role, label)
        assert focus.value_of_css_property("outline-style") == "solid", name
    assert reached == list(names)
    grid = fresh.part("grid")
    assert grid.aria_role == "image" and "64 images of seed 0" in grid.accessible_name
    assert fresh.part("status").aria_role == "status"


def test_the_keys_of_the_slider_change_the_size(fresh: Shown) -> None:
    from selenium.webdriver.common.keys import Keys

    for side in (14, 7):
        fresh.part("head").send_keys(Keys.ARROW_LEFT)
        fresh.until(f"{side}×{side} pixels")
    assert fresh.part("head").get_attribute("aria-valuetext") == "head 1 of 3, 7×7 pixels"


def test_less_motion_shows_the_grid_at_once(fresh: Shown, shipped: Student) -> None:
    feature = {"name": "prefers-reduced-motion", "value": "reduce"}
    fresh.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        fresh.choose(5)
        assert difference(fresh.grid(), expected(shipped, 5, None, 3)) <= 1
    finally:
        fresh.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_pixels_are_enlarged_by_a_whole_factor(fresh: Shown) -> None:
    assert fresh.part("grid").value_of_css_property("image-rendering") == "pixelated"
    assert fresh.part("grid").size["width"] % 224 == 0
    room = "document.documentElement.scrollWidth <= innerWidth"
    metrics = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    fresh.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        time.sleep(0.2)
        assert fresh.driver.execute_script(f"return {room}")
        assert 2 * fresh.part("grid").size["width"] % 224 == 0
    finally:
        fresh.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_names_of_classes_are_shown_as_they_are(driver: Any, tmp_path: Path) -> None:
    names = (NASTY, "über", "bag")
    student = small_student(names, channels=3)
    shown = opened(driver, tmp_path, model_bytes(student))
    shown.until("each")
    assert [shown.option(label) for label in range(3)] == list(names)
    assert NASTY in shown.choose(1, 0)
    assert difference(shown.grid(), expected(student, 1, 0, None)) <= 1
    assert shown.console() == []


def test_controls_that_a_model_has_no_use_for_are_hidden(driver: Any, tmp_path: Path) -> None:
    student = small_student(target="state")
    shown = opened(driver, tmp_path, model_bytes(student))
    assert shown.until("each").startswith("64 images of seed 0, 8×8 pixels, ")
    assert not shown.part("class").is_displayed() and not shown.part("head").is_displayed()
    assert difference(shown.grid(), expected(student, 0, None, None)) <= 1


def test_a_report_runs_its_student(driver: Any, tmp_path: Path) -> None:
    student, image = small_student(("a", "b")), torch.zeros(1, 1, 8, 8)
    pictures = Pictures(image, image, None)
    path = write_report(tmp_path, {}, [], pictures, "", model_bytes(student))
    shown = Shown(driver, path)
    shown.choose(1)
    assert difference(shown.grid(), expected(student, 1, None, None)) <= 1
    assert shown.part("command").text == f"advkd sample --student {tmp_path}/student --seed 1"
    assert shown.console() == []


def test_a_damaged_model_is_explained(driver: Any, tmp_path: Path, shipped_file: bytes) -> None:
    for damaged in (b"", b"no model", shipped_file[:-1], shipped_file[: len(shipped_file) // 2]):
        shown = opened(driver, tmp_path, damaged)
        said = shown.until(r"^The model in this page cannot be used: \w.*[^.]\.$")
        assert "undefined" not in said, said
        assert not shown.part("seed").is_displayed() and not shown.part("grid").is_displayed()


def test_a_damaged_page_is_explained(shown: Shown, tmp_path: Path) -> None:
    text = shown.path.read_text(encoding="utf-8")
    middle = text.index('id="try-model"') + 5000
    for damage in ("AAAA", "?"):
        damaged = tmp_path / "page.html"
        damaged.write_text(text[:middle] + damage + text[middle + len(damage) :])
        Shown(shown.driver, damaged).until(
            "^The model in this page cannot be used: the page is damaged"
        )


@pytest.mark.parametrize(
    "lacks", ["WebAssembly.validate = () => false", "delete globalThis.WebAssembly"]
)
def test_an_old_browser_is_told(shown: Shown, lacks: str) -> None:
    added = shown.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": lacks})
    try:
        said = Shown(shown.driver, shown.path).until("^This browser cannot run the model")
        assert said.endswith("Safari from 16.4.")
    finally:
        shown.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_no_other_files_lie_there() -> None:
    assert {file.name for file in pages.WEB.iterdir()} == {
        *("advkd.js", "advkd.wasm", "base.css", "page.html.j2", "try.css", "try.html.j2", "try.js"),
        "worker.js",
    }
