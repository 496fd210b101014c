"""The app for gunicorn."""
import time
from urllib.parse import parse_qsl


def lines(n, ms):
    for i in range(1, n + 1):
        yield b"line %d of %d\n" % (i, n)
        time.sleep(ms / 1000)


def upload(body):
    size = 0
    while chunk := body.read(65536):
        size += len(chunk)
    return b'{"bytes":%d,"by":"gunicorn"}' % size


def app(environ, start_response):
    path, query = environ["PATH_INFO"], {name: int(value) for name, value in parse_qsl(environ["QUERY_STRING"])}
    if path == "/slow":
        time.sleep(query["ms"] / 1000)
    if path == "/stream":
        start_response("200 OK", [])
        return lines(query["n"], query["ms"])
    body = {"/": b"hello\n", "/slow": b"done\n"}.get(path) or upload(environ["wsgi.input"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
