"""The app for uvicorn."""
import asyncio
from urllib.parse import parse_qsl


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    path, query = scope["path"], {name: int(value) for name, value in parse_qsl(scope["query_string"].decode())}
    if path == "/slow":
        await asyncio.sleep(query["ms"] / 1000)
    size, more = 0, True
    while more:
        part = await receive()
        size, more = size + len(part.get("body", b"")), part.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if path == "/stream":
        for i in range(1, query["n"] + 1):
            line = b"line %d of %d\n" % (i, query["n"])
            await send({"type": "http.response.body", "body": line, "more_body": True})
            await asyncio.sleep(query["ms"] / 1000)
        body = b""
    else:
        body = {"/": b"hello\n", "/slow": b"done\n"}.get(path, b'{"bytes":%d,"by":"uvicorn"}' % size)
    await send({"type": "http.response.body", "body": body})
