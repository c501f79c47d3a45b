"""nginx with nchan: nginx is the child that is measured; this process only posts events to it."""
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from orders import begin, obey, payload

MODULE = "/usr/lib/nginx/modules/ngx_nchan_module.so"
CONFIG = """
load_module {module};
daemon off; worker_processes 1; worker_rlimit_nofile 20000; {user}
pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 15000; }}
http {{
  access_log off; client_body_temp_path {folder}/body; keepalive_requests 1000000;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location = /token {{
      nchan_subscriber eventsource; nchan_channel_id all;
      nchan_subscriber_first_message newest;
    }}
    location = /publish {{
      nchan_publisher http; nchan_channel_id all;
      nchan_message_buffer_length 2000; nchan_message_timeout 60s;
    }}
  }}
}}
"""


def free_port() -> int:
    """Return a port that nothing listens on; nginx cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def start(folder: str, port: int) -> subprocess.Popen:
    """Start nginx and wait until it answers."""
    user = "user root;" if os.geteuid() == 0 else ""
    path = os.path.join(folder, "nginx.conf")
    with open(path, "w") as file:
        file.write(CONFIG.format(module=MODULE, folder=folder, port=port, user=user))
    process = subprocess.Popen(["nginx", "-p", folder, "-c", path, "-e", f"{folder}/error.log"],
                               stdin=subprocess.DEVNULL)
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(.05)
    return process


def post(connection: http.client.HTTPConnection, sequence: int) -> None:
    """Publish an event over the connection that stays open."""
    connection.request("POST", "/publish", payload(sequence))
    answer = connection.getresponse()
    answer.read()
    assert answer.status in (200, 201, 202), answer.status


def main() -> None:
    begin(__doc__)
    if not shutil.which("nginx") or not os.path.exists(MODULE):
        sys.exit("nginx with its module nchan is needed: on Debian, the package libnginx-mod-nchan")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        process = start(folder, port)
        os.sched_setaffinity(0, {1})        # nginx alone has core 0
        print(port, flush=True)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            obey(lambda sequence: post(connection, sequence))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
