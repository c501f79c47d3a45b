"""What somebody may write for an origin, and what a browser sends in its place."""

ORIGINS = [
    ("https://a.test/", "https://a.test"), ("https://a.test/app", "https://a.test"),
    ("https://a.test?x=y", "https://a.test"), ("https://a.test/#x", "https://a.test"),
    ("https://a.test:443", "https://a.test"), ("http://a.test:80", "http://a.test"),
    ("https://a.test:", "https://a.test"), ("http://a.test:08080", "http://a.test:8080"),
    ("http://[::1]:80", "http://[::1]"), ("http://[0:0::0001]:8080", "http://[::1]:8080"),
    ("HTTPS://a.test", "https://a.test"), ("https://A.Test:8443", "https://a.test:8443"),
    ("https://user:word@a.test", "https://a.test"), (" https://a.test", "https://a.test"),
    ("https://a.test\n", "https://a.test"),
    ("https://b\xfccher.example", "https://xn--bcher-kva.example"),
    ("https://B\xdcCHER.example:443/", "https://xn--bcher-kva.example"),
    ("https://\u4f8b\u3048.test", "https://xn--r8jz45g.test"),
]
