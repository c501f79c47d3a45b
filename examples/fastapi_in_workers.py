"""A FastAPI app whose users each see their own notifications. Each worker carries the server.

Run it, in the folder of sse_server.py, and open http://127.0.0.1:8000/login?user=ann:
    pip install fastapi uvicorn 'pyjwt[crypto]'
    uvicorn examples.fastapi_in_workers:app --workers 2 --port 8000
"""
import asyncio
import os
import time
from contextlib import asynccontextmanager
from http.cookies import SimpleCookie
from pathlib import Path

import jwt
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from sse_server import SSEServer

PAGE = Path(__file__).with_name("notifications.html").read_text()
DAY = 24 * 3600

# All workers need the same key, or each would refuse the sessions of the others.
SECRET_KEY = os.environ.get("SECRET_KEY", "only for trying it out, with 32 bytes or more")


@asynccontextmanager
async def lifespan(app):
    """Run the server as long as this worker runs. Uvicorn calls this in every worker."""
    with SSEServer(port=6500, history_file="events.db", reuse_port=True, authorize=channels,
                   origins=["http://127.0.0.1:8000", "http://localhost:8000"]) as app.state.events:
        yield


app = FastAPI(lifespan=lifespan)


def channels(stream_request):
    """Return the channels that a request for a stream may have: those of the app's session."""
    cookies = SimpleCookie(stream_request.fields.get("cookie", ""))
    user = user_of({name: cookie.value for name, cookie in cookies.items()})
    return [f"user/{user}"] if user else False


def user_of(cookies):
    """Return the user of a session, or None. Your own way to know your users goes here."""
    try:
        return jwt.decode(cookies.get("session", ""), SECRET_KEY, ["HS256"])["sub"]
    except jwt.PyJWTError:
        return None


@app.get("/login")
def login(user: str):
    """Log in without a password. Your own login goes here."""
    if not user.isalnum():
        raise HTTPException(400, "Name a user: /login?user=ann")
    answer = RedirectResponse("/", 303)
    cookie = jwt.encode({"sub": user, "exp": time.time() + DAY}, SECRET_KEY, "HS256")
    answer.set_cookie("session", cookie, httponly=True, samesite="lax")
    return answer


@app.get("/")
def page(request: Request):
    user = user_of(request.cookies)
    if not user:
        raise HTTPException(401, "Log in first: /login?user=ann")
    stream = f"http://{request.url.hostname}:6500/?channel=user/{user}&since=24h"
    return HTMLResponse(PAGE.replace("USER", user).replace("STREAM", stream))


@app.post("/send", status_code=204)
async def send(request: Request, to: str, text: str):
    sender = user_of(request.cookies)
    if not sender:
        raise HTTPException(401)
    # In a thread, because a publish into a file takes some milliseconds.
    await asyncio.to_thread(request.app.state.events.publish, f"{sender}: {text}",
                            event="notification", channel=f"user/{to}")
