"""Serve the dense network with LitServe and its batching.

python loadtests/baselines/litserve_app.py --port 8001 --network build/baselines/networks/ag_news-3
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve
from network import Network, arguments


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(max_batch_size=given.batch, batch_timeout=given.wait, api_path="/classify")
        self.given = given

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe passes it by name
        self.network = Network(self.given.network, self.given.threads)

    # LitServe creates its route from this signature: without a type, it accepts any JSON.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request["input"]

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        return self.network(texts)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--wait", type=float, default=0.001, help="seconds to fill a batch")
    given = parser.parse_args()
    server = litserve.LitServer(Classifier(given), accelerator="cpu")
    server.run(
        host="127.0.0.1", port=given.port, num_api_servers=1, log_level="error",
        generate_client_file=False, pretty_logs=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
