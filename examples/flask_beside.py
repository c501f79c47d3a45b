"""A Flask app whose users each see their own notifications. The server runs beside it.

Run it, in the folder of sse_server.py, each line in a terminal of its own, with one secret of at
least 32 bytes in SSE_JWT_KEY, and open http://127.0.0.1:8080/login?user=ann:
    pip install flask gunicorn 'pyjwt[crypto]'
    python sse_server.py --port 6501 --history-file events.db
    gunicorn --workers 2 --bind 127.0.0.1:8000 examples.flask_beside:app
    nginx -p "$PWD" -c examples/nginx-login.conf
"""
import os
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import jwt
from flask import Flask, abort, redirect, request, session

PAGE = Path(__file__).with_name("notifications.html").read_text()
EVENTS = "http://127.0.0.1:6501/"

# Seconds after which a stream ends and the browser opens the next one. So this is how long somebody
# who logs out may still get events.
STREAM_TIME = 300

app = Flask(__name__)
app.secret_key = os.environ.get("SECRET_KEY", "for trying it out only")
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"

# The server has the same key. So it believes what the app signs.
jwt_key = os.environ["SSE_JWT_KEY"]


def sign(**claims):
    return jwt.encode({"exp": time.time() + STREAM_TIME, **claims}, jwt_key, "HS256")


def publish(data, event, channel):
    """Publish an event. Raises OSError if the server did not take it."""
    query = urlencode({"event": event, "channel": channel})
    bearer = {"Authorization": f"Bearer {sign(publish=[channel])}"}
    with urlopen(Request(f"{EVENTS}?{query}", data.encode(), bearer), timeout=5):
        pass


@app.get("/events-token")
def events_token():
    """Tell the proxy what a request for a stream may have: it sends the session along."""
    user = session.get("user") or abort(401)
    return "", 204, {"X-Events-Token": sign(subscribe=[f"user/{user}"])}


@app.get("/login")
def login():
    """Log in without a password. Your own login goes here."""
    user = request.args.get("user", "")
    if not user.isalnum():
        abort(400, "Name a user: /login?user=ann")
    session["user"] = user
    return redirect("/")


@app.get("/logout")
def logout():
    session.clear()
    return "Bye."


@app.get("/")
def page():
    user = session.get("user") or abort(401, "Log in first: /login?user=ann")
    stream = f"/events?channel=user/{user}&since=24h"
    return PAGE.replace("USER", user).replace("STREAM", stream)


@app.post("/send")
def send():
    sender = session.get("user") or abort(401)
    publish(f"{sender}: {request.args['text']}", "notification", f"user/{request.args['to']}")
    return "", 204
