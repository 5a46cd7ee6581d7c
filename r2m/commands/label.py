"""`r2m label`: the page on which a person labels a run's pairs."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from contextlib import closing, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from r2m.names import QUEUE
from r2m.preferences.queue import QUESTIONS
from r2m.runs.folder import read_run

try:
    import uvicorn

    from r2m.preferences.page.pairs import Pairs
    from r2m.preferences.page.server import application
except ImportError as error:
    raise ImportError(f"r2m label needs starlette and uvicorn ({error}): pip install 'r2m-kernels[label]'") from error

logger = logging.getLogger(__name__)


def label(folder: str | Path, host: str = "127.0.0.1", port: int = 8765) -> str:
    """Serve the page until it is interrupted; returns a sentence for the user.

    host: where to listen; everywhere but on the loopback a token is asked for. port: 0 takes a free one.

    Raises FileNotFoundError or ValueError for a folder that is no run's or whose run asks nobody, and OSError if
    another page has the folder or the port, or if the folder cannot be written.
    """
    folder = Path(folder)
    rounds = _rounds(folder)
    lock = FileLock(folder / ".label.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(f"{folder}: another r2m label has this folder; people share its page") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    with lock, closing(_listen(host, port)) as listener:
        pairs, own = Pairs(folder, rounds), _is_loopback(host)
        token = None if own else secrets.token_urlsafe(16)
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        logger.info("%d pairs of %s wait; label them at %s (Ctrl-C ends)", pairs.counts()["waiting"], folder, address)
        settings = uvicorn.Config(
            application(pairs, token=token, host=host),
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
        return f"{pairs.counts()['answered']} answers are in {folder}"


def _rounds(folder: Path) -> int | None:
    """T of the run, None where its folder has no config (a loop of one's own). Raises what `label` does."""
    if not (folder / "config.yaml").is_file() and (folder / QUESTIONS).is_file():
        return None
    config = read_run(folder)
    if config.preferences.labeller != QUEUE and not (folder / QUESTIONS).is_file():
        raise ValueError(
            f"{folder}: preferences.labeller is {config.preferences.labeller!r}, so the run asks no person; expected "
            f"{QUEUE!r}"
        )
    return config.rounds


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error}; expected a free port, such as 0 for any") from error


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
