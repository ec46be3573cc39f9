"""The container's health check: `python -P -m service.healthcheck` exits with 0 if it can classify.

It asks the server in the same container directly: unlike urllib and wget, `http.client` ignores
proxy variables. It imports little, since it runs every few seconds.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from collections.abc import Mapping

SECONDS = 4.0
DEFAULT_PORT = 8000
ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Address to connect to if the server listens on every address."""


def check(environment: Mapping[str, str]) -> str | None:
    """Return why the server with these variables cannot classify now; None: it can."""

    def setting(name: str) -> str:
        return environment.get(f"BUDGETFORMER_{name}", "")

    ports = [int(p) for p in (setting("METRICS_PORT"), setting("PORT")) if p.isdecimal()]
    host, port = ANY.get(setting("HOST"), setting("HOST")), (ports or [DEFAULT_PORT])[0]
    connection: http.client.HTTPConnection
    if setting("TLS_CERT") and not setting("METRICS_PORT").isdecimal():
        # The certificate is for the name that callers use; the connection stays on this host.
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=unverified)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/health/ready")
        response = connection.getresponse()
        body = response.read(1000).decode("utf-8", "replace")
        return None if response.status == http.client.OK else f"{response.status} {body}"
    except (OSError, http.client.HTTPException) as error:
        return f"{host}:{port}: {error}"
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(check(os.environ))
