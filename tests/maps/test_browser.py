"""The page of a map in a browser, where Chromium is installed."""

import html
import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest
from matplotlib.image import imread

from embax import maps

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

TOKENS = ["</script><script>document.title = 'taken'</script>", "<b>bold</b>", "Kings", "50 %", *map(str, range(200))]


def chromium(tmp_path, page, *options, fragment=""):
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--window-size=1200,800"]
    address = f"{page.as_uri()}#{urllib.parse.quote(fragment)}" if fragment else page.as_uri()
    command = [CHROMIUM, *arguments, f"--user-data-dir={tmp_path / 'profile'}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture
def page(tmp_path):
    points = np.random.default_rng(0).normal(size=(len(TOKENS), 2))
    nearest = [[(TOKENS[row - 1], 0.75), ("<i>elsewhere</i>", 0.5)] for row in range(len(TOKENS))]
    maps.draw_html(tmp_path / "map.html", TOKENS, points, title="A <b>title</b>", nearest=nearest)
    return tmp_path / "map.html"


@pytest.mark.parametrize(
    ("fragment", "token"),
    [
        (TOKENS[0], TOKENS[0]),
        ("KIN", "Kings"),
        ("missing", None),
        pytest.param("kings", "Kings", marks=pytest.mark.exhaustive),
        pytest.param("50 %", "50 %", marks=pytest.mark.exhaustive),
        pytest.param("", None, marks=pytest.mark.exhaustive),
    ],
)
def test_page_draws_and_finds(tmp_path, page, fragment, token):
    ran = chromium(tmp_path, page, "--dump-dom", "--enable-logging=stderr", fragment=fragment)
    dom = ran.stdout
    assert not re.findall(r".*CONSOLE.*", ran.stderr)  # neither an error nor a refusal
    assert html.unescape(re.search("<title>(.*?)</title>", dom)[1]) == "A <b>title</b>"
    points, labels = (int(re.search(rf'data-{name}="(\d+)"', dom)[1]) for name in ("points", "labels"))
    card = re.search('<aside id="card".*?</aside>', dom, re.DOTALL)[0]
    if token is None:
        assert points == len(TOKENS)  # all of them, as nothing is near
        assert " hidden" in card
    else:
        assert html.unescape(re.search("<h2>(.*?)</h2>", card)[1]) == token
        shown = [html.unescape(text) for text in re.findall("<span>(.*?)</span>", card)]
        assert shown == [TOKENS[TOKENS.index(token) - 1], "0.750", "<i>elsewhere</i>", "0.500"]
        assert card.count('class="shown"') == 1
    assert 30 < labels <= points
    assert dom.count("<option") == len(TOKENS)


@pytest.mark.parametrize("dark", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_page_follows_the_color_scheme_of_the_reader(tmp_path, page, dark):
    options = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={tmp_path / 'shot.png'}"]
    chromium(tmp_path, page, *options)
    picture = imread(tmp_path / "shot.png")[..., :3]
    assert (np.median(picture) < 0.2) == dark
    middle = picture[120:-80].reshape(-1, 3)
    assert len(np.unique((middle * 255).astype(int), axis=0)) > 50  # dots and letters


# Does what a reader does, and puts down how many points are seen and whose card is shown after each step.
READER = """
const canvas = document.getElementById("map"), card = document.getElementById("card"), steps = {};
canvas.setPointerCapture = () => {};  // there is no real pointer to capture
window.requestAnimationFrame = (act) => setTimeout(act, 0);  // without a screen there may be no frames
const box = canvas.getBoundingClientRect(), middle = [box.x + box.width / 2, box.y + box.height / 2];
const key = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const point = (type, x, y, pointerId = 1) => canvas.dispatchEvent(new PointerEvent(
  type, { pointerId, clientX: middle[0] + x, clientY: middle[1] + y, bubbles: true }));
const wheel = (deltaY) => canvas.dispatchEvent(new WheelEvent(
  "wheel", { deltaY, clientX: middle[0], clientY: middle[1], cancelable: true }));
const frame = () => new Promise((done) => setTimeout(done, 100));
async function step(name, act) {
  act();
  await frame();
  const shown = card.hidden ? null : card.querySelector("h2").textContent;
  steps[name] = [Number(document.body.dataset.points), shown];
}
(async () => {
  await step("begin", () => {});
  await step("next", () => key("n"));
  await step("previous", () => key("p"));
  await step("escape", () => key("Escape"));
  await step("hover", () => point("pointermove", 3, 3));
  await step("leave", () => point("pointerleave", 0, 0));
  await step("click", () => { point("pointerdown", 2, 2); point("pointerup", 2, 2); });
  await step("all", () => { key("Escape"); key("0"); });
  await step("wheel in", () => { for (let i = 0; i < 10; i += 1) wheel(-120); });
  await step("wheel out", () => { for (let i = 0; i < 12; i += 1) wheel(120); });
  await step("plus", () => { key("0"); for (let i = 0; i < 9; i += 1) key("+"); });
  await step("pinch", () => {
    key("0");
    point("pointerdown", -20, 0, 1);
    point("pointerdown", 20, 0, 2);
    for (let x = 20; x < 300; x += 10) { point("pointermove", -x, 0, 1); point("pointermove", x, 0, 2); }
    point("pointerup", -300, 0, 1);
    point("pointerup", 300, 0, 2);
  });
  await step("drag", () => {
    key("0");
    point("pointerdown", 0, 0);
    point("pointermove", 2000, 0);
    point("pointerup", 2000, 0);
  });
  await step("arrow", () => { key("0"); for (let i = 0; i < 40; i += 1) key("ArrowRight"); });
  const search = document.getElementById("search");
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true, cancelable: true }));
  steps.focused = document.activeElement === search;
  await step("search", () => { key("0"); search.value = "kings"; search.form.requestSubmit(); });
  await step("search again", () => { key("Escape"); search.value = "nothing"; search.form.requestSubmit(); });
  steps.answer = document.getElementById("answer").textContent;
  document.body.dataset.steps = JSON.stringify(steps);
})();
"""


def test_page_answers_keys_mouse_and_search(tmp_path, page):
    text = page.read_text()
    policy = re.search("<meta http-equiv.*?>\n", text)[0]
    # A script of the test's own is one that the policy refuses.
    page.write_text(text.replace(policy, "").replace("</body>", f"<script>{READER}</script></body>"))
    dom = chromium(tmp_path, page, "--dump-dom").stdout
    steps = json.loads(html.unescape(re.search('data-steps="(.*?)"', dom)[1]))
    everything = len(TOKENS)
    shown = {name: step[1] for name, step in steps.items() if isinstance(step, list)}
    seen = {name: step[0] for name, step in steps.items() if isinstance(step, list)}
    assert shown["begin"] is None
    assert shown["next"] == TOKENS[0]
    assert shown["previous"] == shown["hover"] == shown["click"] == TOKENS[-1]
    assert shown["escape"] is shown["leave"] is shown["all"] is None
    assert seen["begin"] == seen["all"] == seen["wheel out"] == everything
    assert seen["next"] < everything
    assert 0 < seen["wheel in"] < everything / 2
    assert 0 < seen["plus"] < everything / 2
    assert 0 < seen["pinch"] < everything / 2
    assert seen["drag"] == seen["arrow"] == 0
    assert steps["focused"]
    assert shown["search"] == "Kings"
    assert shown["search again"] is None
    assert steps["answer"] == "not on the map"


def test_page_refuses_other_scripts(tmp_path, page):
    page.write_text(page.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>"))
    assert "<title>taken" not in chromium(tmp_path, page, "--dump-dom").stdout
