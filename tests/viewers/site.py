"""Orthanc and OHIF on one origin: OHIF's files, and /dicom-web handed on."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests import peers
from tests.peers import Orthanc

#: SharedArrayBuffer, which OHIF's volumes are in, needs both (STANDARDS.md §10).
_ISOLATION: Final = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
_HOP_BY_HOP: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length"})
_WEB_VIEWER: Final = Path("/usr/share/orthanc/plugins/libOrthancWebViewer.so")
#: What a site writes into app-config.js: one data source, and nothing else that it would have to find out.
_CONFIG: Final[dict[str, Any]] = {
    "routerBasename": "/",
    "extensions": [],
    "modes": [],
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "investigationalUseDialog": {"option": "never"},
    "defaultDataSourceName": "dicomweb",
    "dataSources": [
        {
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
    ],
}


@dataclass(frozen=True, slots=True)
class Site:
    """An archive, and where a browser finds OHIF before it."""

    orthanc: Orthanc
    origin: str


@contextlib.contextmanager
def site(dist: Path, folder: Path) -> Iterator[Site]:
    """Run Orthanc with DICOMweb and its web viewer in `folder`, and OHIF of the folder `dist` before it, until the block ends."""
    if not _WEB_VIEWER.exists():
        peers.unavailable("Orthanc's web viewer is not installed (apt-get install orthanc-webviewer).")
    port = peers.free_port()
    # It names bulk data by this, and the browser must find them on the origin that it came from.
    dicomweb = {"Enable": True, "Root": "/dicom-web/", "Host": f"127.0.0.1:{port}", "Ssl": False}
    plugins = ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so", str(_WEB_VIEWER)]
    with (
        peers.orthanc(folder, DicomWeb=dicomweb, Plugins=plugins) as orthanc,
        ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, dist, orthanc.http_port)) as server,
    ):
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Site(orthanc, f"http://127.0.0.1:{port}")
        finally:
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, dist: Path, orthanc_port: int, *arguments: Any) -> None:
        self._dist, self._orthanc_port = dist, orthanc_port
        super().__init__(*arguments, directory=str(dist))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web/"):
            self._hand_on()
        elif path == "/app-config.js":
            self._answer(200, {"Content-Type": "text/javascript"}, f"window.config = {json.dumps(_CONFIG)};".encode())
        else:
            if not (self._dist / path.lstrip("/")).is_file():
                self.path = "/index.html"  # OHIF's routes are its own
            super().do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def _hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection = http.client.HTTPConnection("127.0.0.1", self._orthanc_port, timeout=60)
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
        """Say nothing: what fails is seen in the browser."""
