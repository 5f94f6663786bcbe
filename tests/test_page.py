"""The web page: drawing for visitors, the server under load, and the page in a browser."""

import json
import re
import shutil
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import REPO, ScriptRunner
from PIL import Image
from runner import free_port
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from common.config import InputError
from generator.pipeline import ChannelTokPipeline
from page.studio import MAX_FILE_BYTES, Drawing, Studio

C = 16


@pytest.fixture(scope="module")
def studio(pipeline_folder: Path) -> Studio:
    return Studio(ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu"))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------- drawing


def test_a_stopped_and_continued_drawing_is_that_of_the_pipeline(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts, make = list[bool](), studio.image
    monkeypatch.setattr(studio, "image", lambda image, *, draft=False: drafts.append(draft) or make(image, draft=draft))
    choice = studio.choice(2, 7, 1.5, 0.9, refine=False)
    expected = studio.pipeline([2], seed=7, cfg_scale=1.5, temperature=0.9)
    first = next(studio.draw(Drawing(choice=choice)))[0]
    assert 1 <= first.num_tokens < C
    (following, _), *_, (last, image) = studio.draw(first)
    assert drafts[2:] == [True] * (len(drafts) - 3) + [False]  # the first image of each drawing is not refined
    assert following.num_tokens > first.num_tokens, "nothing is drawn again"
    assert last.tokens == tuple(expected.tokens[0].tolist())
    assert last.seconds > first.seconds > 0
    assert np.abs(pixels(image) - pixels(expected.images[0])).max() <= 1
    assert [np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(
        studio.prefixes(last, [4, C]), [studio.pipeline([2], 4, 7, cfg_scale=1.5, temperature=0.9).images[0], image],
        strict=True,
    )] == [True, True]  # fmt: skip
    assert [found for found, _ in studio.draw(last)] == [last]


def test_sketches_have_consecutive_seeds(studio: Studio) -> None:
    studio.sketch_tokens = 4
    sketches = studio.sketches(studio.choice(1, 3, 1, 1, refine=False))
    expected = studio.pipeline([1] * 9, 4, seed=3).tokens.tolist()
    assert [list(sketch.tokens) for sketch in sketches] == expected
    decoded = list(studio.sketch_images(sketches))
    assert len(decoded) == 1 and len(decoded[0]) == 9, "this model has no refiner"
    *_, (last, _) = studio.draw(sketches[8])
    assert last.tokens == tuple(studio.pipeline([1], seed=11).tokens[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 0, 1, 1), "class 5 is unknown; allowed are 0..4"),
        ((-1, 0, 1, 1), "class_label is -1"),
        ((0.5, 0, 1, 1), "class_label is 0.5"),
        ((0, 0.5, 1, 1), "seed is 0.5"),
        ((0, None, 1, 1), "seed is None"),
        ((0, float("nan"), 1, 1), "seed is nan"),
        ((0, -1, 1, 1), "seed is -1"),
        ((0, 0, float("nan"), 1), "cfg_scale is nan"),
        ((0, 0, 1, "hot"), "temperature is 'hot'"),
    ],
)
def test_wrong_settings_are_refused(studio: Studio, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        studio.choice(*arguments, refine=False)
    assert message in str(error.value)


def test_files_that_are_no_photographs_are_refused(studio: Studio, image_folder: Path, tmp_path: Path) -> None:
    choice = studio.choice(0, 0, 1, 1, refine=False)
    assert studio.photograph(image_folder / "val" / "n01" / "0.jpg", choice).num_tokens == C
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(b"0" * (MAX_FILE_BYTES + 1))
    Image.new("1", (10_000, 6_000)).save(tmp_path / "wide.png")
    for name, message in (
        ("text", "not an image"), ("large", "allowed are 10 MB"), ("wide", "10000 x 6000 pixels; allowed"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            studio.photograph(tmp_path / f"{name}.png", choice)


# ------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def serve(scripts: ScriptRunner) -> Iterator[Callable[..., tuple[str, int]]]:
    """Start demo.py with a model; returns its address and process id."""
    started = []

    def start(model: Path) -> tuple[str, int]:
        port = free_port()
        words = scripts.command("demo.py", ["--model", model, "--port", port, "--device", "cpu"])
        started.append(subprocess.Popen(words, env=scripts.environment, stderr=subprocess.PIPE, text=True))
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert started[-1].poll() is None, started[-1].communicate()[1]
            try:
                httpx.get(address)
            except httpx.TransportError:
                time.sleep(0.1)
            else:
                return address, started[-1].pid
        raise TimeoutError

    yield start
    for process in started:
        process.kill()


def visit(address: str, number: int, seed: int, frames: int | None) -> dict[str, Any]:
    """Draw class 1 as a browser does; leave after some frames, or stay to the end."""
    session = f"visitor{seed}"
    body = {"data": [1, seed, 1, 1, False], "fn_index": number, "session_hash": session}
    found: dict[str, Any] = {"ranks": [], "frames": 0}
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=120) as client:
        assert client.post("/queue/join", json=body).status_code == 200
        with client.stream("GET", "/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: ") else {}
                if event.get("msg") == "estimation":
                    found["ranks"].append(event["rank"])
                if event.get("msg") == "process_generating":
                    found["frames"] += 1
                    html = event["output"]["data"][0]
                    found["html"] = html if isinstance(html, str) else html[-1][-1]
                    if found["frames"] == frames:
                        return found
                if event.get("msg") == "process_completed":
                    found["success"] = event["success"]
                    return found
    return found


def draw_event(address: str) -> int:
    config = httpx.get(f"{address}/config").json()
    (number,) = (entry["id"] for entry in config["dependencies"] if entry["api_name"] == "_draw")
    return int(number)


def resident_megabytes(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_many_visitors_each_get_their_own_image(serve: Callable[..., tuple[str, int]], pipeline_folder: Path) -> None:
    address, pid = serve(pipeline_folder)
    number = draw_event(address)
    results: dict[int, dict[str, Any]] = {}
    leaving = set(range(0, 50, 7))

    def run(seed: int) -> None:
        results[seed] = visit(address, number, seed, 1 if seed in leaving else None)

    def visit_all() -> float:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return resident_megabytes(pid)

    levels = [visit_all() for _ in range(3)]
    assert levels[-1] - levels[0] < 30, levels  # MB; the first visits warm caches
    stayed = sorted(set(range(50)) - leaving)
    assert [seed for seed in stayed if not results[seed].get("success")] == []
    assert max(rank for seed in stayed for rank in results[seed]["ranks"]) > 5  # the place in the queue
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    for seed in stayed[::6]:
        html = results[seed]["html"]
        assert f">{C}</span> of {C}" in html
        url = re.search(r"base64,([^\"]+)", html)
        assert url is not None
        image = Image.open(BytesIO(b64decode(url[1])))
        assert np.abs(pixels(image) - pixels(pipeline([1], seed=seed).images[0])).max() <= 1
    wrong = visit(address, number, -1, None)
    assert wrong["success"] is False


# ------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1100"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def eventually(check: Callable[[], Any], seconds: float = 180) -> Any:
    """The first true value of a check."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := check():
                return found
        except Exception:  # noqa: BLE001 - the page replaces elements while they are read
            pass
        time.sleep(0.02)
    raise TimeoutError(check)


def check_upload_is_refused(browser: webdriver.Chrome, path: Path, message: str) -> None:
    """Upload a file, wait for the message, and remove the file from the page."""
    eventually(lambda: browser.find_element(By.CSS_SELECTOR, "#photograph input[type=file]")).send_keys(str(path))
    eventually(lambda: browser.find_element(By.XPATH, f"//*[contains(text(), '{message}')]"))
    button = "#photograph button[aria-label*=emove], #photograph button[aria-label*=lear]"
    # the message may cover the button for a moment
    eventually(lambda: browser.find_element(By.CSS_SELECTOR, button).click() or True)


SET_VALUE = """arguments[0].value = arguments[1];
for (const name of ["input", "blur"]) arguments[0].dispatchEvent(new Event(name, {bubbles: true}));"""


def test_the_page_in_a_browser(
    serve: Callable[..., tuple[str, int]],
    browser: webdriver.Chrome,
    image_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Draw, stop, continue, look at fewer channels, complete a sketch, redraw a photograph, refuse a text file."""
    shots = tmp_path_factory.mktemp("screenshots")

    def element(place: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, place)

    def count(canvas: str = "#canvas") -> int:
        return int(element(f"{canvas} .k").text)

    def tab(name: str) -> None:
        eventually(lambda: browser.find_element(By.XPATH, f"//button[@role='tab'][contains(., '{name}')]")).click()

    address, _ = serve(REPO / "weights" / "demo")
    browser.get(address)
    eventually(lambda: element("#draw")).click()
    eventually(lambda: count() >= 5)
    element("#stop").click()
    time.sleep(0.5)
    stopped = count()
    assert 5 <= stopped <= 200
    time.sleep(1)
    assert count() == stopped
    eventually(lambda: element("#canvas img").get_attribute("alt") == f"image of {stopped} tokens")
    browser.save_screenshot(shots / "stopped.png")
    image = element("#canvas img").get_attribute("src")
    element("#continue").click()
    eventually(lambda: count() == 256)
    browser.save_screenshot(shots / "complete.png")
    browser.execute_script(SET_VALUE, element("#canvas-k input[type=number]"), stopped)
    eventually(lambda: element("#canvas img").get_attribute("src") == image)
    assert count() == stopped

    # two visitors draw, a third one waits, and the browser is the fourth
    number = draw_event(address)
    others = [threading.Thread(target=visit, args=(address, number, seed, None)) for seed in (1, 2, 3)]
    for thread in others:
        thread.start()
    time.sleep(1)
    element("#draw").click()
    eventually(lambda: "queue:" in element("#canvas").text, 20)
    browser.save_screenshot(shots / "queue.png")
    for thread in others:
        thread.join()
    eventually(lambda: count() == 256)

    tab("Sketches")
    eventually(lambda: element("#sketch")).click()
    loaded = "return [...document.querySelectorAll('#gallery img')].filter(i => i.complete && i.naturalWidth).length"
    eventually(lambda: browser.execute_script(loaded) == 9)
    browser.save_screenshot(shots / "sketches.png")
    decoded = element("#gallery img").get_attribute("src")
    eventually(lambda: element("#gallery img").get_attribute("src") != decoded)  # refined
    browser.find_elements(By.CSS_SELECTOR, "#gallery button")[4].click()
    eventually(lambda: count("#finished") == 256)

    tab("Photograph")
    (shots / "text.png").write_text("no image")
    Image.new("1", (10_000, 6_000)).save(shots / "wide.png")
    check_upload_is_refused(browser, shots / "text.png", "not an image")
    check_upload_is_refused(browser, shots / "wide.png", "10000 x 6000 pixels")
    photograph = image_folder / "val" / "n01" / "0.jpg"
    eventually(lambda: element("#photograph input[type=file]")).send_keys(str(photograph))
    eventually(lambda: element("#reconstructions img"))
    element("#redraw").click()
    eventually(lambda: count("#redrawn") == 256)
    browser.save_screenshot(shots / "photograph.png")

    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in sent if entry["method"] == "Network.requestWillBeSent"]
    assert {url.split("/")[2].split(":")[0] for url in urls if url.startswith("http")} == {"127.0.0.1"}
