"""Serve a model in OpenAI's protocol, with a chat page at /.

    python -m vflax.serve --model=WORKDIR|DIR|HUB_ID [--port=8000]

docs/serving.md tells the endpoints, the limits and how to end it.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vflax.errors import UserError

if TYPE_CHECKING:
    from vflax.generate.request import Answering
    from vflax.serve.server import Server
    from vflax.serve.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(argv: Sequence[str] | None) -> int:
    try:
        import fastapi, httptools, httpx, prometheus_client, uvicorn  # noqa: E401, F401, I001
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vflax[serve]'") from None
    from vflax.generate.open import add_engine_flags
    from vflax.serve import log, settings

    parser = argparse.ArgumentParser(
        prog="python -m vflax.serve", description="Serve a model in OpenAI's protocol, with a chat page."
    )
    add_engine_flags(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    settings.add_server_flags(parser)
    args = parser.parse_args(argv)
    chosen = settings.from_flags(args)
    log.write_to(sys.stderr)
    return _serve(args, chosen)


def _serve(args: argparse.Namespace, settings: Settings) -> int:
    """Listen, open the model meanwhile, and answer until told to end."""
    from vflax.serve import server as web

    sock = web.listen(args.host, args.port)
    doorway = web.Doorway()
    server = web.Server(doorway, settings)
    loading = _Loading(args, settings, doorway, server, web.url_of(sock))
    loading.start()
    server.run(sockets=[sock])
    if loading.error is not None:
        raise loading.error
    if loading.engine is None:  # told to end before the model was there: nothing can stop what is loading it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if server.service is not None:
        server.service.close()
    loading.engine.close()
    return 0


class _Loading(threading.Thread):
    """Opens the engine, and the door to it. The server says 503 meanwhile, and ends at once when it is told to."""

    def __init__(
        self, args: argparse.Namespace, settings: Settings, doorway: Any, server: Server, url: str
    ) -> None:
        super().__init__(name="vflax-load", daemon=True)
        self.engine: Answering | None = None
        self.error: BaseException | None = None
        self._args, self._settings, self._url = args, settings, url
        self._doorway, self._server = doorway, server

    def run(self) -> None:
        try:
            from vflax.generate.open import open_engine
            from vflax.serve.app import build_app

            engine, processor = open_engine(self._args)
            self.engine = engine
            app = build_app(engine, processor, self._settings)
        except BaseException as error:  # told by the main thread
            self.error = error
            self._server.should_exit = True
            return
        self._server.service = app.state.service
        self._doorway.app = app
        print(f"{app.state.service.names[0]} is served at {self._url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
