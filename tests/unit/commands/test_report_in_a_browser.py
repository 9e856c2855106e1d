"""The page of `megatron-lpr report` as a browser lays it out: every label can be read, and nothing runs."""

import shutil
import subprocess

import numpy as np
import pytest
from logged_runs import log_run
from matplotlib.image import imread

from megatron_lpr import cli

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1100, 3000
# in a copy of the page: what lies over another label, outside of its picture, or beside the page
LOOK = """
<script>
const faults = [];
for (const svg of document.querySelectorAll("figure > svg")) {
  const all = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
  texts.forEach(([text, a], place) => {
    const name = svg.ariaLabel + ": " + text.textContent;
    if (a.left < all.left - 1 || a.right > all.right + 1 || a.top < all.top - 1 || a.bottom > all.bottom + 1)
      faults.push(name + " is cut off");
    for (const [other, b] of texts.slice(place + 1))
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        faults.push(name + " lies over " + other.textContent);
  });
}
if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the window");
const figures = document.querySelectorAll("figure").length;
document.title = faults.length ? faults.join("; ") : `all ${figures} can be read`;
</script>
"""


@pytest.fixture(scope="module")
def browse():
    """browse(page, option): what a headless browser prints of a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]

    def run(page, *options):
        command = [*words, f"--window-size={WIDTH},{HEIGHT}", *options, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of two runs with names that are long, or mean something in HTML."""
    folder, languages = tmp_path_factory.mktemp("runs"), ("hu", "en", "日本語", "a language with a very long name")
    names = (
        '<script>document.title = "run"</script>',
        "stage 2, with a name that takes much more room than there is " * 2,
    )
    runs = [
        log_run(folder / str(place), name, steps=300, languages=languages[: 3 + place])
        for place, name in enumerate(names)
    ]
    assert cli.main(["report", *map(str, runs), "--out", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_a_screenshot(browse, page, tmp_path):
    shown = {}
    for scheme, light in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        browse(page, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={light}")
        shown[scheme] = imread(picture)[..., :3]
        assert shown[scheme].shape == (HEIGHT, WIDTH, 3)
        counts = np.bincount(np.rint(255 * shown[scheme]).astype(int).reshape(-1, 3) @ [1 << 16, 1 << 8, 1])
        assert np.count_nonzero(counts) > 100 and counts.max() < 0.98 * counts.sum(), "nearly all of it is empty"
    assert shown["light"].mean() > 0.8 and shown["dark"].mean() < 0.3


def test_what_is_on_it_can_be_read_and_does_nothing(browse, page, tmp_path):
    assert "<title>&lt;script&gt;document.title" in browse(page, "--dump-dom")
    text = page.read_text(encoding="utf-8")
    policy = text[text.index("<meta http-equiv") : text.index("<title>")]
    watched = tmp_path / "watched.html"
    watched.write_text(text.replace(policy, "").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    found = browse(watched, "--dump-dom")
    title = found[found.index("<title>") + 7 : found.index("</title>")]
    assert title.startswith("all ") and title.endswith(" can be read"), title
    assert int(title.split()[1]) > 20
