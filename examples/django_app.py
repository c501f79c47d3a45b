"""A Django project in one file, whose users each see their own notifications, in both ways.

Run it, in the folder of sse_server.py, and open http://127.0.0.1:8000/login?user=ann:
    pip install django gunicorn 'pyjwt[crypto]'
    gunicorn --workers 2 --bind 127.0.0.1:8000 examples.django_app:application
That carries the server in every worker. With SSE_JWT_KEY in the environment, the app expects the
server beside it, and nginx or Caddy in front: see flask_beside.py.
"""
import os
import time
from importlib import import_module
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, HttpResponseBadRequest, HttpResponseRedirect, parse_cookie
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

PAGE = Path(__file__).with_name("notifications.html").read_text()
BESIDE = "http://127.0.0.1:6501/"

# Seconds after which a stream ends and the browser opens the next one. So this is how long somebody
# who logs out may still get events.
STREAM_TIME = 300

jwt_key = os.environ.get("SSE_JWT_KEY")

# These settings, views and the start of the server go to settings.py, views.py and wsgi.py of your
# project. Sessions in the database work as well.
settings.configure(
    SECRET_KEY=os.environ.get("SECRET_KEY", "for trying it out only"),
    ALLOWED_HOSTS=["127.0.0.1", "localhost"], ROOT_URLCONF=__name__,
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"])
SessionStore = import_module(settings.SESSION_ENGINE).SessionStore


# The server in every worker

def channels(stream_request):
    """Return the channels that a request for a stream may have: those of the app's session."""
    cookies = parse_cookie(stream_request.fields.get("cookie", ""))
    user = SessionStore(cookies.get(settings.SESSION_COOKIE_NAME)).get("user")
    return [f"user/{user}"] if user else False


def start_events():
    """Start the server of this worker."""
    from sse_server import SSEServer
    return SSEServer(port=6500, history_file="events.db", reuse_port=True, authorize=channels,
                     origins=["http://127.0.0.1:8000", "http://localhost:8000"]).start()


# The server beside it

def sign(**claims):
    import jwt
    return jwt.encode({"exp": time.time() + STREAM_TIME, **claims}, jwt_key, "HS256")


def post(data, event, channel):
    """Publish an event. Raises OSError if the server did not take it."""
    query = urlencode({"event": event, "channel": channel})
    bearer = {"Authorization": f"Bearer {sign(publish=[channel])}"}
    with urlopen(Request(f"{BESIDE}?{query}", data.encode(), bearer), timeout=5):
        pass


@require_GET
def events_token(request):
    """Tell the proxy what a request for a stream may have: it sends the session along."""
    user = request.session.get("user")
    if not user or not jwt_key:
        return HttpResponse(status=401)
    return HttpResponse(status=204, headers={"X-Events-Token": sign(subscribe=[f"user/{user}"])})


# The app

@require_GET
def login(request):
    """Log in without a password. Your own login goes here."""
    user = request.GET.get("user", "")
    if not user.isalnum():
        return HttpResponseBadRequest("Name a user: /login?user=ann")
    request.session["user"] = user
    return HttpResponseRedirect("/")


@require_GET
def page(request):
    user = request.session.get("user")
    if not user:
        return HttpResponse("Log in first: /login?user=ann", status=401)
    host = request.get_host().partition(":")[0]
    stream = "/events" if jwt_key else f"http://{host}:6500/"
    stream += f"?channel=user/{user}&since=24h"
    return HttpResponse(PAGE.replace("USER", user).replace("STREAM", stream))


@require_POST
def send(request):
    sender = request.session.get("user")
    if not sender:
        return HttpResponse(status=401)
    publish = events.publish if events else post
    publish(f"{sender}: {request.GET['text']}", event="notification",
            channel=f"user/{request.GET['to']}")
    return HttpResponse(status=204)


urlpatterns = [path("", page), path("login", login), path("send", send),
               path("events-token", events_token)]
application = get_wsgi_application()

# Gunicorn imports this file in each worker, after the fork, unless it is told to --preload.
events = None if jwt_key else start_events()
