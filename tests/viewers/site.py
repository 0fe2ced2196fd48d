"""One origin for the browser: OHIF's files, and /dicom-web and /orthanc handed to Orthanc."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests.peers import Orthanc

#: SharedArrayBuffer, which OHIF's volumes are in, needs both (STANDARDS.md §10).
_ISOLATION: Final = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length"})
_SOURCE: Final[dict[str, Any]] = {
    "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
    "sourceName": "dicomweb",
    "configuration": {
        "friendlyName": "Orthanc",
        "name": "orthanc",
        "wadoUriRoot": "/dicom-web",
        "qidoRoot": "/dicom-web",
        "wadoRoot": "/dicom-web",
        "imageRendering": "wadors",
        "thumbnailRendering": "wadors",
        "qidoSupportsIncludeField": False,
        "supportsFuzzyMatching": False,
        "enableStudyLazyLoad": True,
        "omitQuotationForMultipartRequest": True,
    },
}
_CONFIG: Final[dict[str, Any]] = {
    "routerBasename": "/",
    "extensions": [],
    "modes": [],
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "investigationalUseDialog": {"option": "never"},
    "dataSources": [_SOURCE],
    "defaultDataSourceName": "dicomweb",
}


@contextlib.contextmanager
def site(dist: Path, orthanc: Orthanc) -> Iterator[str]:
    """Serve OHIF of the folder `dist` before `orthanc` until the block ends; gives the origin."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(dist))

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/dicom-web/"):
                self._hand_on()
            elif path == "/app-config.js":
                self._answer(200, {"Content-Type": "text/javascript"}, f"window.config = {json.dumps(_CONFIG)};".encode())
            else:
                if not (dist / path.lstrip("/")).is_file():
                    self.path = "/index.html"  # its routes are the program's
                super().do_GET()

        do_POST = do_PUT = do_GET

        def _hand_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            connection = http.client.HTTPConnection("127.0.0.1", orthanc.http_port, timeout=60)
            try:
                connection.request(self.command, self.path, body or None, headers)
                response = connection.getresponse()
                kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
                self._answer(response.status, kept, response.read())
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def end_headers(self) -> None:
            for name, value in _ISOLATION.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing: what fails is in the browser's log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
