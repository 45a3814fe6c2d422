"""A bucket in memory, behind the part of Google's JSON API that gcsfs and tensorstore use: python -m tests.gcs PORT.

Objects have generations, and writes and deletions preconditions on them, by which tensorstore keeps a database whole.
https://cloud.google.com/storage/docs/json_api
"""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"
ROUTE = re.compile(r"(?P<kind>/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<objects>/o/?(?P<name>[^/]+)?)?")

OBJECTS: dict[str, tuple[int, str, bytes]] = {}  # by name: generation, time, content
UPLOADS: dict[str, tuple[str, bytes]] = {}  # by their identity: name, what has come
LOCK = threading.Lock()
GENERATIONS = itertools.count(1000)


def resource(name: str) -> dict[str, Any]:
    generation, time, data = OBJECTS[name]
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "generation": str(generation),
        "metageneration": "1",
        "size": str(len(data)),
        "contentType": "application/octet-stream",
        "timeCreated": time,
        "updated": time,
        "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"code": status, "message": message}})

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query, route = dict(parse_qsl(url.query)), ROUTE.fullmatch(url.path)
        if route is None:
            return self.fail(501, f"{self.command} {self.path} is not in this server")
        if route["bucket"] != BUCKET:
            return self.fail(404, "The specified bucket does not exist.")
        with LOCK:
            if route["objects"] is None:
                return self.reply(200, {"kind": "storage#bucket", "name": BUCKET})
            if route["kind"] == "/upload":
                return self.write(query, body)
            if route["name"] is None:
                return self.list(query)
            name = unquote(route["name"])
            if name not in OBJECTS:
                return self.fail(404, f"No such object: {BUCKET}/{name}")
            if not self.holds(name, query):
                return None
            if self.command == "DELETE":
                del OBJECTS[name]
                return self.reply(204)
            return self.read(name) if query.get("alt") == "media" else self.reply(200, resource(name))

    do_GET = do_POST = do_DELETE = answer

    def holds(self, name: str, query: dict[str, str]) -> bool:
        """Whether the preconditions hold; else the answer is sent."""
        generation = OBJECTS[name][0] if name in OBJECTS else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            self.fail(412, "At least one of the pre-conditions you specified did not hold.")
            return False
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            self.reply(304)
            return False
        return True

    def read(self, name: str) -> None:
        generation, _, data = OBJECTS[name]
        headers = {"x-goog-generation": str(generation), "x-goog-metageneration": "1"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.reply(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= stop:
            return self.fail(416, "The requested range cannot be satisfied.")
        return self.reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def write(self, query: dict[str, str], body: bytes) -> None:
        if query.get("uploadType") == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            about, data = (
                part.split(b"\n\n", 1)[1] for part in body.split(b"--" + boundary[1].encode())[1:3]
            )  # [metadata, content]
            name, data = json.loads(about)["name"], data.removesuffix(b"\n")
        elif query.get("uploadType") == "media":
            name, data = query["name"], body
        elif "upload_id" not in query:  # a resumable one begins
            identity = f"{next(GENERATIONS)}"
            UPLOADS[identity] = json.loads(body)["name"], b""
            host = self.headers["Host"]
            where = f"http://{host}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={identity}"
            return self.reply(200, headers={"Location": where})
        else:
            name, before = UPLOADS.pop(query["upload_id"])
            data = before + body
            if self.headers["Content-Range"].endswith("/*"):  # and goes on
                UPLOADS[query["upload_id"]] = name, data
                return self.reply(308, headers={"Range": f"bytes=0-{len(data) - 1}"})
        if self.holds(name, query):
            OBJECTS[name] = (next(GENERATIONS), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), data)
            self.reply(200, resource(name))

    def list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for name in sorted(OBJECTS):
            if name.startswith(prefix) and name >= first and (not end or name < end):
                head, more, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if more:
                    prefixes.add(prefix + head + more)
                else:
                    items.append(resource(name))
        self.reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
