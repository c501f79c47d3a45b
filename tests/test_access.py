"""Who may watch and publish what: tables of cases, each of a request, a clock, and a decision."""
import base64
import hashlib
import hmac
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest

from helpers import Client, connect, get, post
from origin_cases import ORIGINS
from sse_core.http import http1, signed
from sse_core.http.access import EVERYTHING, Access, Grant
from sse_core.errors import HTTPError
from sse_server import SSEServer

NOW = 1_700_000_000.5
SECRET = "the-secret-of-this-server-is-long"
CLAIMS = {"exp": NOW + 60, "subscribe": ["news", "user-42*"], "publish": ["news"]}
GRANT = Grant(("news", "user-42*"), NOW + 60)


def access(tokens=(), publish_tokens=(), authorize=None, origins=(), scheme="http", **options):
    return Access(tokens, publish_tokens, authorize, origins, scheme, **options)


def request(target="/", *fields, method="GET", host="x"):
    head = get(target, *fields, method=method).replace(b"Host: x", f"Host: {host}".encode())
    return http1.parse(head)[0]


def outcome(decide, *arguments, **options):
    """Return what is decided: a grant, or the status and the text of a refusal."""
    try:
        return decide(*arguments, **options)
    except HTTPError as http_error:
        assert http_error.text.isprintable() and SECRET not in http_error.text
        return http_error.status, http_error.text


def refused(result, status, said=""):
    return not isinstance(result, Grant) and result[0] == status and said in result[1]


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(claims=CLAIMS, key=SECRET, header='{"alg":"HS256"}', digest=hashlib.sha256):
    """Sign a token by hand, also one that no library would."""
    claims = claims if isinstance(claims, str) else json.dumps(claims)
    body = f"{base64url(header.encode())}.{base64url(claims.encode())}"
    return f"{body}.{base64url(hmac.new(key.encode(), body.encode(), digest).digest())}"


@pytest.fixture(scope="module")
def keys():
    """Key pairs by algorithm, and some that will not do; skip where the packages are not there."""
    pytest.importorskip("jwt", reason="needs PyJWT")
    pytest.importorskip("cryptography", reason="needs cryptography")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    def public(key, encoding=form.Encoding.PEM, kind=form.PublicFormat.SubjectPublicKeyInfo):
        return key.public_key().public_bytes(encoding, kind)
    own, ec_key = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())
    pem = public(own).decode()
    private = own.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return SimpleNamespace(
        pairs={"HS256": (SECRET, SECRET), "RS256": (own, pem),
               "ES256": (ec_key, public(ec_key).decode())},
        strange={"RS256": rsa.generate_private_key(65537, 2048),
                 "ES256": ec.generate_private_key(ec.SECP256R1())},
        useless={
            "private": private.decode(), "cut": pem[:200], "without its lines": pem[27:-26],
            "der": base64.b64encode(public(ec_key, form.Encoding.DER)).decode(),
            "ssh": public(own, form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode(),
            "small": public(rsa.generate_private_key(65537, 1024)).decode(),
            "curve": public(ec.generate_private_key(ec.SECP384R1())).decode(),
            "jwk": json.dumps({"kty": "oct", "k": base64url(SECRET.encode())}),
            "31 bytes": "x" * 31, "empty": "", "space": SECRET + " ", "line": SECRET + "\n"})


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256"])
def test_a_token_by_pyjwt_is_taken_if_the_key_and_its_algorithm_are_ours(keys, algorithm):
    import jwt
    rules = access(jwt_key=keys.pairs[algorithm][1])
    for name, (private, _) in keys.pairs.items():
        result = outcome(rules.admit, request("/" + jwt.encode(CLAIMS, private, name)), NOW)
        assert result == GRANT if name == algorithm else refused(result, 401, "not signed")
    for name, private in keys.strange.items():
        token = jwt.encode(CLAIMS, private, name)
        assert refused(outcome(rules.admit, request("/" + token), NOW), 401, "not signed")
    header, body, signature = jwt.encode(CLAIMS, keys.pairs[algorithm][0], algorithm).split(".")
    other = jwt.encode({**CLAIMS, "subscribe": ["*"]}, SECRET).split(".")[1]
    for parts in ((header, other, signature), (header, body, signature[:-4]), (header, body, ""),
                  (header, body, signature, signature), (header, body), (body, header, signature),
                  ("", "", ""), (header, body, signature + "é"), (header, body + "=", signature)):
        bearer = f"Authorization: Bearer {'.'.join(parts)}"
        assert refused(outcome(rules.admit, request("/", bearer), NOW), 401, "not signed"), parts
    for public in (keys.pairs["RS256"][1], keys.pairs["RS256"][1].strip(), keys.pairs["ES256"][1]):
        for rule in (rules, access(jwt_key=public)):        # what everybody knows as the secret
            result = outcome(rule.admit, request("/" + forge(key=public)), NOW)
            assert refused(result, 401, "not signed")


@pytest.mark.parametrize("header", [
    '{"alg":"none"}', '{"alg":"nOnE"}', '{"alg":null}', '{"alg":""}', '{"alg":["HS256"]}', "{}",
    '{"alg":"HS384"}', '{"alg":"RS256"}', '"HS256"', "[]", "", "HS256", "[" * 2500,
    '{"alg":"HS256","kid":1}', '{"alg":"HS256","b64":false,"crit":["b64"]}', '{"alg":"\\ud800"}'])
def test_a_header_that_is_not_as_it_should_be_is_a_401_even_if_signed(keys, header):
    rules = access(jwt_key=SECRET)
    for token in (forge(header=header), forge(header=header, digest=hashlib.sha384),
                  forge(header=header).rpartition(".")[0] + "."):
        assert refused(outcome(rules.admit, request("/" + token), NOW), 401, "not signed")


ABSENT = object()


@pytest.mark.parametrize("changed, status, said", [
    ({}, 200, ""), ({"exp": int(NOW) + 1}, 200, ""), ({"exp": NOW + 1e-3}, 200, ""),
    ({"exp": NOW}, 401, "expired"), ({"exp": int(NOW)}, 401, "expired"), ({"exp": 0}, 401, "ex"),
    ({"exp": ABSENT}, 401, "exp"), ({"exp": None}, 401, "exp"), ({"exp": True}, 401, "exp"),
    ({"exp": str(NOW + 60)}, 401, "exp"), ({"exp": [NOW + 60]}, 401, "exp"),
    ({"exp": float("nan")}, 401, "exp"), ({"exp": float("inf")}, 401, "exp"),
    ({"exp": 10 ** 400}, 401, "exp"), ({"exp": -1}, 401, "exp"),
    ({"exp": (NOW + 60) * 1000}, 401, "seconds"),
    ({"nbf": NOW}, 200, ""), ({"nbf": 0}, 200, ""), ({"nbf": NOW + 60}, 401, "not valid yet"),
    ({"nbf": None}, 401, "nbf"), ({"nbf": "0"}, 401, "nbf"), ({"nbf": False}, 401, "nbf"),
    ({"iat": NOW}, 200, ""), ({"iat": 0}, 200, ""), ({"iat": NOW + 60}, 401, "not valid yet"),
    ({"iat": "x"}, 401, "iat"), ({"iat": NOW * 1000}, 401, "seconds"),
    # For whoever signs to judge, and not for us
    ({"sub": 5, "iss": [], "jti": 1}, 200, ""),
    ({"aud": "other"}, 401, "aud"), ({"aud": []}, 401, "aud"),
    ({"subscribe": ABSENT}, 403, "subscribe"), ({"subscribe": None}, 401, "subscribe"),
    ({"subscribe": "news"}, 401, "subscribe"), ({"subscribe": {"news": 1}}, 401, "subscribe"),
    ({"subscribe": ["news", 1]}, 401, "subscribe"), ({"subscribe": [["news"]]}, 401, "subscribe"),
    ({"publish": ABSENT}, 200, "")])
def test_claims_that_are_not_as_they_should_be_are_told(keys, changed, status, said):
    claims = {name: value for name, value in {**CLAIMS, **changed}.items() if value is not ABSENT}
    token = forge(claims)
    result = outcome(access(jwt_key=SECRET).admit, request("/" + token), NOW)
    if status == 200:
        assert result == Grant(("news", "user-42*"), claims["exp"])
    else:
        assert refused(result, status, said) and token not in result[1]
    swapped = {**claims, "publish": claims.get("subscribe"), "subscribe": ["*"]}
    if "subscribe" not in claims:
        del swapped["publish"]
    post = request(f"/{forge(swapped)}?channel=news", method="POST")
    result = outcome(access(jwt_key=SECRET).admit_post, post, NOW)
    assert isinstance(result, Grant) if status == 200 else result[0] == status


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("ahead, status", [(1, 200), (5, 200), (5.5, 401)])
def test_the_clock_of_whoever_signs_may_be_five_seconds_ahead(keys, claim, ahead, status):
    token = forge({**CLAIMS, claim: NOW + ahead})
    result = outcome(access(jwt_key=SECRET).admit, request("/" + token), NOW)
    assert result == GRANT if status == 200 else refused(result, 401, f"claim {claim} is in the fu")


def test_claims_are_an_object_and_a_token_no_longer_than_a_cookie(keys):
    rules = access(jwt_key=SECRET)
    for claims in ([], [CLAIMS], '"exp"', 5, None, "", "no JSON", "[" * 2900):
        assert refused(outcome(rules.admit, request("/" + forge(claims)), NOW), 401, "not signed")
    lengths = {}
    for size in range(2900, 3000):
        token = forge({**CLAIMS, "x": "y" * size})
        lengths[len(token)] = isinstance(outcome(rules.admit, request("/" + token), NOW), Grant)
    assert {length: length <= signed.MAX_TOKEN for length in lengths} == lengths
    assert set(lengths.values()) == {True, False}


@pytest.mark.parametrize("granted, channel, is_granted", [
    (["*"], "news", True), (["*"], "*", True), (["*"], None, True),
    (["news"], "news", True), (["news"], "news2", False), (["news"], "new", False),
    (["news"], "News", False), (["news"], None, False), ([], "news", False), ([], None, False),
    (["user-42*"], "user-42", True), (["user-42*"], "user-42-mail", True),
    (["user-42*"], "user-4", False), (["user-42*"], "user-43", False), (["user-42*"], None, False),
    (["a*b"], "a*b", True), (["a*b"], "axb", False), (["*b"], "xb", False), (["*b"], "*b", True),
    ([""], "news", False), ([""], None, False), (["**"], "*x", True), (["**"], "x", False),
    (["a", "b"], "b", True), (["?"], "x", False), (["[a-z]"], "a", False), ([".*"], "x", False)])
def test_a_channel_is_granted_by_its_name_or_how_it_begins(granted, channel, is_granted):
    grant = Grant(tuple(granted))
    if is_granted:
        grant.check(channel)
        return
    with pytest.raises(HTTPError) as caught:
        grant.check(channel)
    assert caught.value.status == 403
    assert (repr(channel) if channel else "everyone") in caught.value.text


@pytest.mark.parametrize("query, watch, publish", [
    ("", 200, 403), ("?channel=news", 200, 200), ("?channel=user-42.a", 200, 403),
    ("?channel=other", 403, 403), ("?channel=news&channel=other", 403, 403),
    ("?channel=other&channel=news", 403, 403), ("?channel=", 403, 403),
    ("?channel=%0d%0aX:%20y", 403, 403), (f"?channel={'x' * 5000}", 403, 403)])
def test_a_channel_that_the_token_does_not_grant_is_a_403(keys, query, watch, publish):
    rules, token = access(jwt_key=SECRET), forge()
    result = outcome(rules.admit, request(f"/{token}{query}"), NOW)
    assert result == GRANT if watch == 200 else refused(result, 403) and len(result[1]) < 300
    result = outcome(rules.admit_post, request(f"/{token}{query}", method="POST"), NOW)
    assert result == Grant(("news",), NOW + 60) if publish == 200 else refused(result, 403)
    everything = request(f"/{forge({**CLAIMS, 'publish': ['*']})}{query}", method="POST")
    assert rules.admit_post(everything, NOW) == Grant(("*",), NOW + 60)


def test_where_the_body_names_the_channels_the_grant_checks_each(keys):
    rules = access(jwt_key=SECRET)
    grant = rules.admit_post(request(f"/{forge()}", method="POST"), NOW, body_names=True)
    grant.check("news")
    assert refused(outcome(grant.check, "other"), 403) and refused(outcome(grant.check, None), 403)
    post = request(f"/{forge()}?channel=other", method="POST")
    assert refused(outcome(rules.admit_post, post, NOW, body_names=True), 403, "other")


PLAIN = {"tokens": ["one"], "publish_tokens": ["two"]}
JWT = {"jwt_key": SECRET}


@pytest.mark.parametrize("options, path, fields, watch, publish", [
    # JWT stands for a good token, BAD for one with another signature
    (JWT, "/JWT", [], 200, 200), (JWT, "/", ["Authorization: Bearer JWT"], 200, 200),
    (JWT, "/", ["Cookie: sse_token=JWT"], 200, 401), (JWT, "/", [], 401, 401),
    (JWT, "/", ["Cookie: a=b; sse_token=JWT; c"], 200, 401), (JWT, "/?sse_token=JWT", [], 401, 401),
    # A proxy may hand on the pieces into which HTTP/2 splits a Cookie
    (JWT, "/", ["Cookie: a=b", "Cookie: sse_token=JWT"], 200, 401),
    (JWT, "/", ["Cookie: sse_token=JWT", "cookie: a=b, c"], 200, 401),
    (JWT, "/", ["Cookie: SSE_TOKEN=JWT"], 401, 401), (JWT, "/", ["Cookie: sse_token"], 401, 401),
    (JWT, "/", ["Cookie: xsse_token=JWT"], 401, 401), (JWT, "/", ["Cookie: sse_token="], 401, 401),
    (JWT, "/", ["Authorization: Basic JWT"], 401, 401), (JWT, "//JWT", [], 401, 401),
    (JWT, "/JWT/", [], 401, 401), (JWT, "/any", ["Authorization: bearer  JWT"], 200, 200),
    (JWT, "/a.b", ["Cookie: sse_token=JWT"], 200, 401), (JWT, "/BAD", [], 401, 401),
    (JWT, "/JWT", ["Authorization: Bearer BAD"], 401, 401),
    (JWT, "/BAD", ["Authorization: Bearer JWT"], 200, 200),
    (JWT, "/JWT", ["Authorization: Bearer"], 401, 401),
    (JWT, "/JWT", ["Cookie: sse_token=BAD"], 200, 200),
    (JWT, "/BAD", ["Cookie: sse_token=JWT"], 401, 401),
    (JWT, "/", ["Authorization: Bearer BAD", "Cookie: sse_token=JWT"], 401, 401),
    (JWT, "/one", [], 401, 401), (PLAIN, "/JWT", [], 401, 401),
    (PLAIN, "/one", [], 200, 401), (PLAIN, "/two", [], 401, 200),
    (PLAIN, "/", ["Cookie: sse_token=one"], 401, 401),
    ({**PLAIN, **JWT}, "/one", [], 200, 401), ({**PLAIN, **JWT}, "/two", [], 401, 200),
    ({**PLAIN, **JWT}, "/JWT", [], 200, 200), ({**PLAIN, **JWT}, "/three", [], 401, 401),
    ({**PLAIN, **JWT}, "/", ["Authorization: Bearer one"], 200, 401),
    ({**PLAIN, **JWT}, "/one", ["Cookie: sse_token=BAD"], 200, 401),
    ({}, "/", [], 200, 403), ({}, "/BAD", ["Authorization: Bearer BAD"], 200, 403),
    ({"publish_tokens": ["two"]}, "/", [], 200, 401)])
def test_tokens_are_taken_from_where_they_belong(keys, options, path, fields, watch, publish):
    good, bad = forge({**CLAIMS, "publish": ["*"]}), forge(key=SECRET[::-1])
    path, *fields = [each.replace("JWT", good).replace("BAD", bad) for each in (path, *fields)]
    rules = access(**options)
    for method in ("GET", "HEAD"):
        result = outcome(rules.admit, request(path, *fields, method=method), NOW)
        assert isinstance(result, Grant) if watch == 200 else refused(result, watch)
    result = outcome(rules.admit_post, request(path, *fields, method="POST"), NOW)
    assert isinstance(result, Grant) if publish == 200 else refused(result, publish)


def test_a_plain_token_is_for_everything_and_has_no_end(keys):
    rules = access(**PLAIN, **JWT)
    assert rules.admit(request("/one?channel=any"), NOW) == EVERYTHING == Grant(("*",), math.inf)
    assert rules.admit_post(request("/two", method="POST"), NOW) == EVERYTHING
    assert outcome(rules.admit_list, request("/", "Authorization: Bearer two")) is None
    for nobody, status in ((rules, 401), (access(), 403)):
        assert refused(outcome(nobody.admit_list, request("/", "Authorization: Bearer one")),
                       status)


def test_a_bearer_token_loses_outer_spaces_only():
    for token in ("voil\u00e0", "\u00c5"):         # in UTF-8 they end in bytes that latin-1 strips
        padded = request("/", f"Authorization: Bearer  {token} ")
        assert access(tokens=[token]).admit(padded, NOW) == EVERYTHING
    for byte in (b"\xa0", b"\x85"):
        head = get("/", "Authorization: Bearer one")[:-4] + byte + b"\r\n\r\n"
        assert refused(outcome(access(tokens=["one"]).admit, http1.parse(head)[0], NOW), 401)


@pytest.mark.parametrize("path, fields, is_known_to_be_wrong", [
    ("/", [], False), ("//", [], False), ("/-/metrics", [], False),
    ("/", ["Authorization: Bearer"], False), ("/", ["Authorization: Basic one"], False),
    ("/three", [], True), ("/a.b.c", [], True), ("/", ["Authorization: Bearer three"], True),
    ("/-/status", ["Authorization: Bearer three"], True)])
@pytest.mark.parametrize("rule", ["plain", "signed", "authorize"])
def test_a_wrong_token_is_told_as_unknown_and_none_as_missing(keys, path, fields, rule,
                                                            is_known_to_be_wrong):
    rules = access(**{"plain": PLAIN, "signed": JWT, "authorize": {"authorize": lambda _: False}
                      }[rule])
    for decide, method in ((rules.admit, "GET"), (rules.admit_post, "POST")):
        if method == "GET" or rule != "authorize":
            with pytest.raises(HTTPError) as caught:
                decide(request(path, *fields, method=method), NOW)
            assert ("not known" in caught.value.text) is is_known_to_be_wrong
            assert ("missing" in caught.value.text) is not is_known_to_be_wrong
            # RFC 6750 section 3.1: no error where there was no token
            error = ' error="invalid_token"' if is_known_to_be_wrong else ""
            assert caught.value.fields == (f"WWW-Authenticate: Bearer{error}",)


def test_a_wrong_token_for_the_list_of_clients_is_told_as_unknown():
    for fields, said in (([], "missing"), (["Authorization: Bearer one"], "not known")):
        assert refused(outcome(access(**PLAIN).admit_list, request("/-/status?list", *fields)),
                       401, said)


def test_a_key_that_is_no_secret_and_no_public_key_is_refused_and_not_repeated(keys):
    access(jwt_key="é" * 16), access(jwt_key=f"\n {keys.pairs['ES256'][1]}\n")
    for name, key in keys.useless.items():
        with pytest.raises(ValueError, match="for signed tokens") as caught:
            access(jwt_key=key)
        assert not key or key.strip() not in str(caught.value), name


@pytest.mark.parametrize("package, key", [("jwt", SECRET), ("cryptography.exceptions", "PEM")])
def test_a_package_that_is_missing_is_named(keys, monkeypatch, package, key):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'pyjwt\[crypto\]'"):
        access(jwt_key=keys.pairs["RS256"][1] if key == "PEM" else key)


@pytest.mark.parametrize("answer, granted", [
    (True, EVERYTHING), (False, 401), (None, 401), (["a", "b*"], Grant(("a", "b*"))),
    ([], Grant(())), (("*",), EVERYTHING), ({"a"}, Grant(("a",))), ({"a": 1}.keys(), Grant(("a",))),
    ((each for each in "a"), Grant(("a",))), ("a", TypeError), ("", TypeError), (b"a", TypeError),
    (1, TypeError), (0, TypeError), ([1], TypeError), (["a", None], TypeError)])
def test_authorize_says_yes_or_no_or_which_channels(answer, granted):
    rules = access(tokens=["one"], authorize=lambda _: answer)
    assert rules.takes_time
    if granted is TypeError:
        with pytest.raises(TypeError, match="authorize returned no bool: a list of strings is due"):
            rules.admit(request("/one"), NOW)
    else:
        result = outcome(rules.admit, request("/one"), NOW)
        assert result == granted if granted != 401 else refused(result, 401, "token is not known")
    strict = access(authorize=lambda _: ["a"])
    assert refused(outcome(strict.admit, request("/?channel=a&channel=b"), NOW), 403, "'b'")


def test_only_authorize_takes_time(keys):
    assert not access(tokens=["one"], jwt_key=SECRET, allowed_hosts=["x"]).takes_time


@pytest.mark.parametrize("host, origin, status", [
    ("x", None, 200), ("x", "https://app.test", 200), ("x", "http://x", 403), ("x", "null", 200),
    ("x", "https://evil.test", 403), ("evil.test:6500", "http://evil.test:6500", 403),
    ("localhost:6500", "http://localhost:6500", 200), ("localhost", "http://localhost", 200),
    ("localhost:6500", "http://localhost:6501", 403), ("localhost:65", "https://localhost:65", 403),
    ("127.0.0.1:6500", "http://127.0.0.1:6500", 200), ("127.9.8.7", "http://127.9.8.7", 200),
    ("[::1]:6500", "http://[::1]:6500", 200), ("127.evil.test", "http://127.evil.test", 403),
    ("127.0.0.1.evil.test", "http://127.0.0.1.evil.test", 403),
    ("128.0.0.1", "http://128.0.0.1", 403),
    ("localhost.evil.test", "http://localhost.evil.test", 403), ("[::2]", "http://[::2]", 403),
    ("localhost.:6500", "http://localhost.:6500", 200), ("app.test.", "http://app.test.", 200),
    ("10.0.0.7:6500", "http://10.0.0.7:6500", 200), ("10.0.0.8", "http://10.0.0.8", 403),
    ("app.test:6500", "http://app.test:6500", 200), ("APP.test", "http://APP.test", 200),
    ("app.test", "http://evil.test", 403), ("evil.test", "http://app.test", 403),
    ("", "http://", 403), ("ev!l.test", "http://ev!l.test", 403)])
def test_a_page_of_our_own_may_publish_by_a_host_that_no_stranger_can_make_lead_here(
        host, origin, status):
    fields = [f"Origin: {origin}"] if origin else []
    post = request("/two", *fields, method="POST", host=host)
    rules = access(publish_tokens=["two"], origins=["https://app.test", "null"], host="10.0.0.7")
    result = outcome(rules.admit_post, post, NOW)
    assert result == EVERYTHING if status == 200 else refused(result, 403, "--origin")
    assert access(publish_tokens=["two"]).admit_post(post, NOW) == EVERYTHING


@pytest.mark.parametrize("host, allowed", [
    ("good.test", True), ("GOOD.test", True), ("good.test:8080", True), ("good.test:", True),
    ("10.0.0.7:80", True), ("[fd00::1]", True), ("[FD00::1]:80", True), ("[::7]", True),
    ("evil.test", False), ("good.test.evil.test", False), ("xgood.test", False), ("", False),
    ("localhost", False), ("127.0.0.1", False), ("10.0.0.70", False), ("[fd00::2]", False),
    # The final dot of a full domain name makes no other host of it
    ("good.test.", True), ("Good.Test.:8080", True), ("dotted.test", True), ("dotted.test.", True),
    ("good.test..", False), (".", False), ("evil.test.", False)])
def test_with_allowed_hosts_any_other_is_a_421(host, allowed):
    rules = access(allowed_hosts=["Good.test", "10.0.0.7", "fd00::1", "[::7]", "dotted.test."])
    result = outcome(rules.check_host, request(host=host))
    assert result is None if allowed else refused(result, 421, "--allowed-host")
    assert outcome(access().check_host, request(host=host)) is None


def test_a_request_without_a_host_is_for_none_that_is_allowed():
    old = http1.parse(b"GET / HTTP/1.0\r\n\r\n")[0]
    assert refused(outcome(access(allowed_hosts=["x"]).check_host, old), 421)


@pytest.mark.parametrize("option, values", [
    ("tokens", [""]), ("tokens", ["a", " b"]), ("tokens", ["b "]), ("tokens", ["b\n"]),
    ("tokens", ["\tb"]), ("tokens", ["b\xa0"]), ("tokens", [" "]), ("publish_tokens", [""]),
    ("publish_tokens", ["b "]), ("origins", ["a.test"]), ("origins", ["https://a.test/"]),
    ("allowed_hosts", [""]), ("allowed_hosts", ["https://a.test"]), ("allowed_hosts", ["a b"]),
    ("allowed_hosts", ["*"]), ("allowed_hosts", ["good.test", "[::1"])])
def test_what_would_let_in_anybody_or_nobody_is_refused_at_construction(option, values):
    with pytest.raises(ValueError) as caught:
        access(**{option: values})
    assert "b" not in values or "b" not in str(caught.value).split()


@pytest.mark.parametrize("option", ["tokens", "publish_tokens", "origins", "allowed_hosts"])
def test_a_str_where_a_list_is_due_is_refused_and_not_repeated(option):
    for value in (SECRET, "", 5, None, b"token", [b"token"], [SECRET, 5]):
        with pytest.raises(TypeError, match=f"{option}: a list of strings is due") as caught:
            access(**{option: value})
        assert SECRET not in str(caught.value)
    access(**{option: iter(["x://y"] if option == "origins" else ["x"])})


# More of them, of which a browser makes something else, or nothing
HARD_ORIGINS = [
    ("", "https://example.org"), ("https://", "https://example.org"),
    ("a.test", "https://example.org"), ("https:/a.test", "https://example.org"),
    ("https://a.test.", "https://a.test"), ("http://[fe80::1%25eth0]", "http://[fe80::1]"),
    ("https://a test", "https://example.org"), ("https://a..test", "https://example.org"),
    ("https://a.test https://b.test", "a single"), ("https://a.test,https://b.test", "a single"),
    ("https://a.test:99999", "https://example.org"), ("https://a.test:x", "https://example.org"),
    ("http://::1", "https://example.org"), ("NuLL", "or null"), ("//a.test", "https://example.org"),
    ("http://[::1", "https://example.org"), ("file:///home", "https://example.org"),
    ("https://a%41.test", "https://example.org"),
    # Python's codec would make fass.test of it, another name than that of browsers
    ("https://fa\xdf.test", "xn--"), ("https://" + "\xfc" * 64 + ".test", "xn--"),
    ("*", "leave it out"), ("https://*.a.test", "a single"), ("https://a.test:*", "a single"),
]


@pytest.mark.parametrize("written, said", ORIGINS + HARD_ORIGINS)
def test_an_origin_that_no_browser_sends_is_refused_with_what_to_write(written, said):
    with pytest.raises(ValueError) as caught:
        access(origins=[written])
    message = str(caught.value)
    assert said in message and "\n" not in message and "word" not in message
    if (written, said) in ORIGINS:
        assert message.endswith(f"write {said}")
        access(origins=[said])


@pytest.mark.parametrize("origin", [
    "null", "https://a.test", "http://a.test:443", "https://a.test:80", "https://a_b-c.test:1",
    "http://localhost:3000", "http://127.0.0.1:6500", "http://[fd00::1]:6500", "https://1.a.test",
    "https://xn--bcher-kva.example", "https://www.xn--r8jz45g.test",
    "chrome-extension://abcdefghijklmnop", "capacitor://localhost"])
def test_an_origin_as_browsers_send_it_is_taken(origin):
    fields = access(origins=[origin]).cross_origin(request("/", f"Origin: {origin}"))
    assert fields[0] == f"Access-Control-Allow-Origin: {origin}"


@pytest.mark.parametrize("written, said", [
    ("good.test:8080", "write good.test in"), ("https://good.test", "write good.test in"),
    ("https://good.test:8443/app", "write good.test in"), ("good.test..", "write good.test in"),
    ("https://user:word@good.test", "write good.test in"), ("[::1]:6500", "write ::1 in"),
    ("fd00:0::1", "write fd00::1 in"), ("b\xfccher.example", "write xn--bcher-kva.example in"),
    ("good.test/", "write good.test in"), ("good.test?x", "write good.test in"),
    (" good.test", "example.org"), ("user:word@good.test", "write good.test in"),
    ("*.good.test", "example.org"), ("*", "leave it out"), ("", "example.org"),
    ("a b", "example.org"), ("a:b:c", "example.org"), (".", "example.org"),
    ("fa\xdf.test", "xn--")])
def test_an_allowed_host_that_no_request_names_is_refused_with_what_to_write(written, said):
    with pytest.raises(ValueError) as caught:
        access(allowed_hosts=[written])
    assert said in str(caught.value) and "word" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, JWT])
@pytest.mark.parametrize("origin, credentials", [
    ("https://app.test", True), ("null", False), ("https://evil.test", False)])
def test_cookies_count_for_pages_of_named_origins_only(keys, options, origin, credentials):
    rules = access(origins=["https://app.test", "null"], **options)
    fields = rules.cross_origin(request("/", f"Origin: {origin}"))
    assert ("Access-Control-Allow-Credentials: true" in fields) is credentials
    assert fields[-1] == "Vary: Origin"
    assert access(**options).cross_origin(request("/", f"Origin: {origin}")) == [
        "Access-Control-Allow-Origin: *"]


def test_a_server_asks_these_rules_with_the_time_of_day(keys):
    token = forge({"exp": time.time() + 60, "subscribe": ["a"], "publish": ["a"]})
    old = forge({"exp": time.time() - 1, "subscribe": ["*"]})
    with SSEServer(port=0, jwt_key=SECRET, allowed_hosts=["x"]) as server, \
            Client(server.port, get("/?channel=a", f"Cookie: sse_token={token}")) as client:
        client.open()
        assert post(server.port, f"/{token}?channel=a", b"hi").startswith(b"HTTP/1.1 200 ")
        assert client.read_events(1)[0].data == "hi"
        for target, status in ((f"/{token}?channel=b", 403), (f"/{old}", 401), ("/", 401)):
            assert status_of(server.port, get(target)) == status
            assert status_of(server.port, get(target, "Content-Length: 0", method="POST")) == status
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            head = get(f"/{token}?channel=a", "Content-Length: 0", method=method)
            assert status_of(server.port, head.replace(b"Host: x", b"Host: evil.test")) == 421


def status_of(port, head):
    """Send a request, and return the status that comes first, also of a stream."""
    with connect(port) as sock:
        sock.sendall(head)
        return int(sock.recv(100).split()[1])


def test_the_authority_of_an_absolute_target_counts_in_place_of_host():
    rules = access(allowed_hosts=["good.test"])
    assert outcome(rules.check_host, request("http://good.test/x", host="evil.test")) is None
    assert refused(outcome(rules.check_host, request("http://evil.test/x", host="good.test")),
                   421, "--allowed-host")
