"""The documentation as a site, in a headless Chromium if there is one."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import serious_faults

ROOT = Path(__file__).parents[1]
PAGES = (
    "",
    "harden/",
    "tutorials/harden/",
    "tasks/",
    "compare/",
    "evaluation/",
    "results/headline/",
    "performance/",
    "api/",
)


@pytest.fixture(scope="module")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(site: str, browser: Any, pictures: Path, width: int, scheme: str) -> None:
    """No request elsewhere, nothing wider than the screen, and nothing that axe finds serious."""
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    for path in PAGES:
        answer = page.goto(f"{site}/{path}")
        assert answer.status == 200
        page.wait_for_timeout(300)
        if not path:
            page.screenshot(path=pictures / f"site-{width}-{scheme}.png")
        assert serious_faults(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    assert hosts <= {urlsplit(site).netloc, ""}
    page.close()
