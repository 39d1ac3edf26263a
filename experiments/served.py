"""A GGUF file behind llama.cpp's own server, for as long as a command needs it.

Command:  python -m experiments.served MODEL.gguf [--port 8080]   (until it is interrupted)
Needs:    the package xllamacpp (pip install xllamacpp)

The server speaks OpenAI's protocol, so a model behind it is `openai:URL#MODEL` everywhere in
jaxalign: a judge, an optimiser of prompts, or a policy.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxalign.errors import UserError

STARTED = "listening on "
"""Beginning of the line that the server's process prints when requests can be sent."""
WAIT = 300.0
"""Most seconds that loading a model takes."""


@contextlib.contextmanager
def served(
    model: str | Path,
    *,
    threads: int | None = None,
    slots: int = 1,
    context: int = 4096,
    port: int = 0,
) -> Iterator[str]:
    """Context in which a model answers; its server is stopped at the end, whatever happens.

    Args:
      model: GGUF file.
      threads: of the computation; None: one for every core.
      slots: requests that are answered at a time; each keeps the prefix of its last prompt.
      context: most tokens of a prompt and its answer.
      port: of the server; 0: any that is free. Stored answers are found again at the same port.

    Yields:
      Its name for jaxalign, "openai:URL#MODEL".

    Raises:
      UserError: there is no such file, xllamacpp is not installed, or the server does not start.
    """
    path = checked(model)
    command = [sys.executable, "-m", "experiments.served", str(path), "--slots", str(slots)]
    command += ["--context", str(context), "--port", str(port)]
    command += ["--threads", str(threads)] if threads else []
    log = path.with_suffix(".log") if os.access(path.parent, os.W_OK) else Path(os.devnull)
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield f"openai:{_url(process, log)}#{path.stem}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def checked(model: str | Path) -> Path:
    """The path of a file that can be served.

    Raises:
      UserError: there is no such file, or xllamacpp is not installed.
    """
    path = Path(model)
    if not path.is_file():
        raise UserError(f"{model}: there is no such GGUF file")
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("xllamacpp: llama.cpp's server needs it; pip install xllamacpp")
    return path


def _url(process: subprocess.Popen[str], log: Path) -> str:
    """Where a server that is starting listens.

    Raises:
      UserError: it ended, or needs too long.
    """
    assert process.stdout is not None
    slow = threading.Timer(WAIT, process.kill)
    slow.start()
    try:
        for line in process.stdout:
            if line.startswith(STARTED):
                return line.removeprefix(STARTED).strip()
    finally:
        slow.cancel()
    raise UserError(f"llama.cpp's server has not started; its messages are in {log}")


def main() -> None:
    """Serve until the process is interrupted or the one that started it is gone."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("model", help="GGUF file")
    flags.add_argument("--threads", type=int, help="of the computation (default: one a core)")
    flags.add_argument("--slots", type=int, default=1, help="requests at a time")
    flags.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer")
    flags.add_argument("--port", type=int, default=0, help="0: any that is free")
    given = flags.parse_args()
    path = checked(given.model)
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = given.context * given.slots
    parameters.n_parallel = given.slots
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = given.port
    threads = given.threads or len(os.sched_getaffinity(0))
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started_by = os.getppid()
    server = xllamacpp.Server(parameters)
    print(f"{STARTED}{server.listening_address}/v1", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while os.getppid() == started_by:
            time.sleep(0.5)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"served: {error}") from None
