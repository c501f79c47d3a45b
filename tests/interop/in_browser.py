"""Open a page in a browser, and print what it reports.

in_browser.py ENGINE PAGE PORT BASE URL NAME...

ENGINE  chromium, firefox or webkit
PAGE    a file in the folder pages
PORT    where this program serves that folder, the packages, and takes the page's reports
BASE    the origin by which the page is opened: of this program, or of a proxy that leads here
URL     the stream; NAME... the names of events that the page listens for

It runs until its standard input ends or SIGTERM comes, and takes the browser with it.
"""
from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import tempfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode

FOLDER = Path(__file__).resolve().parent
CHROMIUM = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-sync", "--disable-background-networking",
            "--disable-component-update", "--disable-dev-shm-usage"]
WEBKIT = "/usr/lib/*/webkit2gtk-4.*/MiniBrowser"

# So that Firefox looks for nothing but the page.
PREFERENCES = {
    "app.normandy.enabled": False, "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False, "browser.safebrowsing.downloads.remote.enabled": False,
    "browser.shell.checkDefaultBrowser": False, "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False, "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,", "toolkit.telemetry.enabled": False,
}


class Handler(SimpleHTTPRequestHandler):
    """Serve the folder under /interop/, and print the body of every POST."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, directory=str(FOLDER), **options)

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.replace("/interop/", "/", 1))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        print(body.decode(), flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


def command(engine: str, profile: str, url: str) -> list[str]:
    """Return what starts the engine with an empty profile."""
    if engine == "chromium":
        return [*CHROMIUM, f"--user-data-dir={profile}", url]
    if engine == "firefox":
        lines = [f"user_pref({name!r}, {str(value).lower() if value is False else repr(value)});"
                 for name, value in PREFERENCES.items()]
        Path(profile, "user.js").write_text("\n".join(lines))
        return ["firefox-esr", "--headless", "--no-remote", "--profile", profile, url]
    return ["xvfb-run", "-a", glob.glob(WEBKIT)[0], url]


def main(engine: str, page: str, port: str, base: str, url: str, *names: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    query = urlencode([("url", url), ("report", f"http://127.0.0.1:{port}/interop/report"),
                       *(("name", name) for name in names)])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # A home of its own: WebKit keeps cookies and caches there.
        environment = {**os.environ, "HOME": profile, "XDG_CACHE_HOME": profile,
                       "XDG_DATA_HOME": profile, "XDG_CONFIG_HOME": profile}
        browser = subprocess.Popen(
            command(engine, profile, f"{base}/interop/pages/{page}?{query}"), env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        try:
            sys.stdin.read()
        finally:
            # The group: a browser is many processes, and xvfb-run a script with two.
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
