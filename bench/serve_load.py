"""What a server does under load (docs/serving.md): requests, errors, tokens, latency, memory.

    python bench/serve_load.py --workdir runs/quick/demix [--clients 32 --seconds 120]

Starts `demix serve` on a free port, waits until everything is compiled, measures the first token
of single requests, and then lets clients ask one request after the other over loopback: streamed
and not, of the mixture and of single experts, of several lengths. A client that is refused (429)
waits as long as the server says.
"""

import argparse
import collections
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

PROMPTS = (
    "def main(",
    "#include <stdio.h>\n",
    "import numpy as np\n\n\nclass ",
    "The",
    "x = [1, 2",
)


def main() -> None:
    """Prints the measurements as lines of text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    given, flags = parser.parse_known_args()
    command = [sys.executable, "-m", "demix_jax", "serve", f"--workdir={given.workdir}", "--port=0"]
    begun = time.perf_counter()
    server = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        found = re.search(r":(\d+)$", [server.stdout.readline() for _ in range(2)][1].strip())
        assert found, "the server did not start"
        port = int(found[1])
        print(f"ready after {time.perf_counter() - begun:.1f} s")
        while health(port)["left_to_compile"]:
            time.sleep(0.5)
        print(f"all compiled after {time.perf_counter() - begun:.1f} s")
        models = [model["id"] for model in ask(port, "GET", "/v1/models")["data"]]
        first_tokens(port, models)
        load(port, models, server.pid, given.clients, given.seconds)
        server.terminate()
        print(f"ended with status {server.wait(30)}")
    finally:
        server.kill()


def first_tokens(port: int, models: list[str]) -> None:
    """Measures the time to the first token of a stream, one request at a time."""
    for model in models[:2]:
        for tokens in (4, 60):
            times = sorted(first_token(port, model, tokens) for _ in range(20))
            print(
                f"first token, {model}, prompt of {tokens} tokens: "
                f"median {times[10] * 1e3:.0f} ms, least {times[0] * 1e3:.0f} ms"
            )


def first_token(port: int, model: str, tokens: int) -> float:
    """Returns seconds from a new connection to the first token's event."""
    fields = {"model": model, "prompt": list(range(10, 10 + tokens)), "max_tokens": 2}
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps(fields | {"stream": True, "seed": 1})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: {")
    seconds = time.perf_counter() - begun
    answer.read()
    connection.close()
    return seconds


def load(port: int, models: list[str], pid: int, clients: int, seconds: float) -> None:
    """Lets clients ask until the time is over, and prints what they saw."""
    statuses: collections.Counter[str] = collections.Counter()
    latencies: list[float] = []
    end = time.monotonic() + seconds
    before = health(port)["generated_tokens"]
    threads = [
        threading.Thread(target=client, args=(port, models, i, end, statuses, latencies))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < end:
        memory.append(resident(pid))
        time.sleep(seconds / 12)
    for thread in threads:
        thread.join()
    after = health(port)
    tokens = after["generated_tokens"] - before
    print(f"{clients} clients, {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    print(f"{tokens} tokens, {tokens / seconds:.0f} a second")
    cuts = statistics.quantiles(latencies, n=100)
    print("seconds a request: " + ", ".join(f"p{p} {cuts[p - 1]:.2f}" for p in (50, 90, 99)))
    print("resident MB: " + " ".join(f"{value:.0f}" for value in memory))
    print(f"afterwards: waiting {after['waiting']}, running {after['running']}")


def client(
    port: int,
    models: list[str],
    number: int,
    end: float,
    statuses: collections.Counter[str],
    latencies: list[float],
) -> None:
    """Asks one request after the other; every twentieth stream is left before its end."""
    rng = random.Random(number)
    while time.monotonic() < end:
        fields = {
            "model": rng.choice([models[0], models[0], *models[1:3]]),
            "prompt": rng.choice(PROMPTS),
            "max_tokens": rng.choice([1, 16, 48]),
            "stream": rng.random() < 0.5,
        }
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=150)
        begun = time.perf_counter()
        try:
            header = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(fields), header)
            answer = connection.getresponse()
            if fields["stream"] and answer.status == 200 and rng.random() < 0.05:
                answer.readline()
                statuses["left"] += 1
                continue
            data = answer.read()
            whole = not fields["stream"] or answer.status != 200 or data.endswith(b"[DONE]\n\n")
            statuses[str(answer.status) if whole else "broken stream"] += 1
            if answer.status == 200:
                latencies.append(time.perf_counter() - begun)
            elif answer.status == 429:
                time.sleep(float(answer.getheader("Retry-After", "1")))
        except OSError as error:
            statuses[type(error).__name__] += 1
        finally:
            connection.close()


def resident(pid: int) -> float:
    """Returns the resident memory of a process in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1e3


def ask(port: int, method: str, path: str) -> dict:
    """Returns the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path)
    return json.loads(connection.getresponse().read())


def health(port: int) -> dict:
    """Returns what the server says of itself."""
    return ask(port, "GET", "/health")


if __name__ == "__main__":
    main()
