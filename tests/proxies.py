"""Proxies in front of servers, each configured as its file in examples/ says."""
import getpass
import grp
import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

from helpers import PATIENCE, TOP, listens, need, wait_until

# What examples/apache.conf needs beside Apache itself
MODULES = "mpm_event authz_core alias proxy proxy_http asis".split()

# What surrounds a site of Debian's Apache. One process, for each has kept connections of its own
APACHE = """ServerRoot {folder}
PidFile {folder}/apache.pid
ErrorLog {folder}/apache.log
ServerName localhost
ServerLimit 1
StartServers 1
MaxRequestWorkers 25
{modules}
<Directory />
    Require all denied
</Directory>
Include {path}
"""

# What a client of a stream gets while no server is there
BUSY = 'event: busy\nretry: 1000\ndata: {"retry": 1}\n\n'


class Proxy(NamedTuple):
    """A proxy that can be run."""

    # Its Debian package
    package: str

    # Its configuration in examples/
    example: str

    # How it is started: {path} is the configuration, {folder} its folder, {port} its port
    command: str


PROXIES = {
    "nginx": Proxy("nginx", "nginx.conf", "nginx -p {folder} -c {path}"),
    "haproxy": Proxy("haproxy", "haproxy.cfg", "haproxy -db -f {path}"),
    "caddy": Proxy("caddy", "Caddyfile", "caddy run --config {path} --adapter caddyfile"),
    "apache2": Proxy("apache2", "apache.conf", "apache2 -f {folder}/main.conf -DFOREGROUND"),
    # Without its jail, which is another user who may not read the folder of a test
    "varnishd": Proxy("varnish", "varnish.vcl",
                      "varnishd -j none -F -n {folder}/varnish -a 127.0.0.1:{port} -f {path}"),
    "lighttpd": Proxy("lighttpd", "lighttpd.conf", "lighttpd -D -f {path}"),
}


@contextmanager
def running(name: str, ports: Sequence[int], folder: Path) -> Iterator[None]:
    """Run a proxy on the first of these ports, in front of servers on the others.

    Its files are in the folder. Skips the test if the proxy is not installed.
    """
    proxy = PROXIES[name]
    need(name, proxy.package)
    values = {"folder": folder, "port": ports[0], "path": configured(name, ports, folder)}
    command = [part.format(**values) for part in proxy.command.split()]
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, env={**os.environ, "HOME": str(folder)})
    try:
        wait_until(lambda: process.poll() is not None or listens(ports[0]))
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def configured(name: str, ports: Sequence[int], folder: Path) -> Path:
    """Copy the example into the folder, with this test's ports and paths in place of its own."""
    for away in ("away.asis", "haproxy-away.http"):
        shutil.copy(TOP / "examples" / away, folder)
    text = (TOP / "examples" / PROXIES[name].example).read_text()
    replaced = dict(zip(("6500", "6501", "6502"), map(str, ports)))
    text = re.sub(r"\b650[0-2]\b", lambda port: replaced[port[0]], text)
    text = text.replace("/tmp/sse-nginx", f"{folder}/nginx")
    text = text.replace("/etc/apache2", str(folder))
    # A test may have fewer descriptors
    text = text.replace("maxconn 5000", "maxconn 200")
    # Started by root, nginx would work as another user, who may not write into the folder
    user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
    text = text.replace("daemon off;", f"daemon off;\nuser {user} {group};")
    # Caddy's port for administrators may be taken
    text = text.replace("grace_period", "admin off\n\tgrace_period")
    # So long does Caddy hold each request of an outage
    text = text.replace("lb_try_duration 5s", "lb_try_duration 1s")
    path = folder / PROXIES[name].example
    path.write_text(text)
    modules = [f"LoadModule {each}_module /usr/lib/apache2/modules/mod_{each}.so"
               for each in MODULES]
    (folder / "main.conf").write_text(
        APACHE.format(folder=folder, path=path, modules="\n".join(modules)))
    return path
