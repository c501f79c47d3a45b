"""A FastAPI app whose users each see their own notifications. The server runs beside it.

Run it, in the folder of sse_server.py, each line in a terminal of its own, with one secret of at
least 32 bytes in SSE_JWT_KEY, and open http://127.0.0.1:8080/login?user=ann:
    pip install fastapi uvicorn httpx 'pyjwt[crypto]'
    python sse_server.py --port 6501 --history-file events.db
    uvicorn examples.fastapi_beside:app --workers 2 --port 8000
    nginx -p "$PWD" -c examples/nginx-login.conf
"""
import os
import time
from pathlib import Path

import httpx
import jwt
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

PAGE = Path(__file__).with_name("notifications.html").read_text()
EVENTS = "http://127.0.0.1:6501/"
DAY = 24 * 3600

# Seconds after which a stream ends and the browser opens the next one. So this is how long somebody
# who logs out may still get events.
STREAM_TIME = 300

SECRET_KEY = os.environ.get("SECRET_KEY", "only for trying it out, with 32 bytes or more")

# The server has the same key. So it believes what the app signs.
JWT_KEY = os.environ["SSE_JWT_KEY"]

app = FastAPI()


def sign(**claims):
    return jwt.encode({"exp": time.time() + STREAM_TIME, **claims}, JWT_KEY, "HS256")


async def publish(data, event, channel):
    """Publish an event. Raises httpx.HTTPError if the server did not take it."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        answer = await client.post(EVENTS, content=data.encode(),
                                   params={"event": event, "channel": channel},
                                   headers={"Authorization": f"Bearer {sign(publish=[channel])}"})
        answer.raise_for_status()


@app.get("/events-token", status_code=204)
def events_token(request: Request, response: Response):
    """Tell the proxy what a request for a stream may have: it sends the session along."""
    user = user_of(request.cookies)
    if not user:
        raise HTTPException(401)
    response.headers["X-Events-Token"] = sign(subscribe=[f"user/{user}"])


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
    stream = f"/events?channel=user/{user}&since=24h"
    return HTMLResponse(PAGE.replace("USER", user).replace("STREAM", stream))


@app.post("/send", status_code=204)
async def send(request: Request, to: str, text: str):
    sender = user_of(request.cookies)
    if not sender:
        raise HTTPException(401)
    await publish(f"{sender}: {text}", "notification", f"user/{to}")
