"""A Flask app whose users each see their own notifications. Each worker carries the server.

Run it, in the folder of sse_server.py, and open http://127.0.0.1:8000/login?user=ann:
    pip install flask gunicorn
    gunicorn --config examples/gunicorn.conf.py examples.flask_in_workers:app
"""
import os
from pathlib import Path

from flask import Flask, abort, redirect, request, session

from sse_server import SSEServer

PAGE = Path(__file__).with_name("notifications.html").read_text()

app = Flask(__name__)

# All workers need the same key, or each would refuse the sessions of the others.
app.secret_key = os.environ.get("SECRET_KEY", "for trying it out only")
app.config["SESSION_COOKIE_SAMESITE"] = "Lax"

# The server of this worker.
events = None


def start_events():
    """Start the server. Call this after the fork: gunicorn.conf.py does."""
    global events
    events = SSEServer(port=6500, history_file="events.db", reuse_port=True, authorize=channels,
                       origins=["http://127.0.0.1:8000", "http://localhost:8000"]).start()


def channels(stream_request):
    """Return the channels that a request for a stream may have: those of the app's session."""
    cookie = stream_request.fields.get("cookie", "")
    with app.test_request_context(headers={"Cookie": cookie}):
        user = session.get("user")
    return [f"user/{user}"] if user else False


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
    host = request.host.partition(":")[0]
    stream = f"http://{host}:6500/?channel=user/{user}&since=24h"
    return PAGE.replace("USER", user).replace("STREAM", stream)


@app.post("/send")
def send():
    sender = session.get("user") or abort(401)
    text = f"{sender}: {request.args['text']}"
    events.publish(text, event="notification", channel=f"user/{request.args['to']}")
    return "", 204
