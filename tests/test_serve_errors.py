"""What `demix serve` refuses: requests, each with its status and reason, and addresses."""

import json
import socket
import time

import pytest
from edits import make_run
from serving import Server

from demix_jax.errors import DemixError
from demix_jax.serving.server import serve
from demix_jax.serving.settings import Settings, read_api_key

KEY = "k" * 32


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("served") / "run", ("law", "med"), context=16)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def server(workdir, key_file):
    bounds = ("--max_choices=4", "--max_body_kb=4", "--body_timeout=0.3", "--request_timeout=30")
    made = Server(workdir, f"--api_key_file={key_file}", *bounds, "--nowarm_up", key=KEY)
    yield made
    assert made.end()[0] == 0


BAD = [  # fields besides model and prompt, status, field at fault, message
    ({"model": None}, 400, "model", "you must provide a model"),
    ({"model": 5}, 400, "model", "model must be a string, not 5"),
    ({"model": "demix:lew"}, 404, "model", "there is no model 'demix:lew'; did you mean "
     "'demix:law'? (models: demix, demix:law, demix:med)"),
    ({"prompt": None}, 400, "prompt", "prompt must be a string, a list of strings, token ids"),
    ({"prompt": []}, 400, "prompt", "prompt must be a string"),
    ({"prompt": ["a", 1]}, 400, "prompt", "prompt must be a string"),
    ({"prompt": [True]}, 400, "prompt", "prompt must be a string"),
    ({"prompt": ""}, 400, "prompt", "prompt 1 is empty"),
    ({"prompt": ["a", ""]}, 400, "prompt", "prompt 2 is empty"),
    ({"prompt": [[97], []]}, 400, "prompt", "prompt 2 is empty"),
    ({"prompt": [[97, 257]]}, 400, "prompt", "prompt 1 has token id 257; ids are 0 to 256"),
    ({"prompt": [-1]}, 400, "prompt", "token id -1"),
    ({"prompt": [10**30]}, 400, "prompt", "token id 1000"),
    ({"prompt": "\ud800"}, 400, "prompt", "prompt 1 has a lone surrogate"),
    ({"prompt": "x" * 16}, 400, "prompt", "the prompt has 17 tokens with its document token, the "
     "context 16; shorten it"),
    ({"prompt": "x" * 9, "max_tokens": 8}, 400, "max_tokens", "room for max_tokens 7, not 8"),
    ({"prompt": list("abcde")}, 400, "prompt", "5 prompts with n 1 are 5 texts, at most 4"),
    ({"n": 5}, 400, "n", "1 prompts with n 5 are 5 texts, at most 4"),
    ({"n": 0}, 400, "n", "n must be 1 or more, not 0"),
    ({"n": True}, 400, "n", "n must be a whole number, not true"),
    ({"n": 1.5}, 400, "n", "n must be a whole number, not 1.5"),
    ({"max_tokens": -1}, 400, "max_tokens", "max_tokens must be 0 or more"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens 0 gives nothing without echo"),
    ({"max_tokens": 10**12}, 400, "max_tokens", "max_tokens must be 16 at most"),
    ({"max_tokens": "5"}, 400, "max_tokens", 'max_tokens must be a whole number, not "5"'),
    ({"temperature": -0.5}, 400, "temperature", "temperature must be 0 or more, and finite"),
    ({"temperature": [1]}, 400, "temperature", "temperature must be a finite number, not a list"),
    ({"top_p": 0}, 400, "top_p", "top_p must be in (0, 1]"),
    ({"seed": -1}, 400, "seed", "seed must be 0 to 4294967295"),
    ({"stop": [""]}, 400, "stop", "none empty"),
    ({"stop": ["a"] * 17}, 400, "stop", "stop may have 16 strings"),
    ({"stop": 3}, 400, "stop", "stop must be a string"),
    ({"logprobs": 21}, 400, "logprobs", "logprobs must be 0 to 20, not 21"),
    ({"logprobs": True}, 400, "logprobs", "logprobs must be a whole number, not true"),
    ({"echo": 1}, 400, "echo", "echo must be true or false, not 1"),
    ({"best_of": 3}, 400, "best_of", "best_of 3 is not supported"),
    ({"suffix": "x"}, 400, "suffix", 'suffix "x" is not supported'),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "is not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "is not supported"),
    ({"temprature": 1}, 400, "temprature", "unknown field temprature; did you mean 'temperature'?"),
    ({"stream_options": 1}, 400, "stream_options", "stream_options must be an object"),
    ({"stream_options": {"x": 1}}, 400, "stream_options.x", "unknown field stream_options.x"),
    ({"demix": []}, 400, "demix", "demix must be an object, not a list"),
    ({"demix": {"expert": "law"}}, 400, "demix.expert", "did you mean 'experts'?"),
    ({"demix": {"experts": ["lew"]}}, 400, "demix.experts", "model 'demix' has no expert 'lew'; "
     "did you mean 'law'? (experts: law, med)"),
    ({"demix": {"experts": []}}, 400, "demix.experts", "demix.experts is empty"),
    ({"model": "demix:law", "demix": {"experts": ["med"]}}, 400, "demix.experts", "has no expert"),
    ({"demix": {"prior": "even"}}, 400, None, "unknown prior 'even'"),
    ({"demix": {"prior": "cached:law"}}, 400, None, "no cached prior 'law' (priors: none)"),
    ({"demix": {"top_k_experts": 3}}, 400, None, "top_k 3 cannot be kept of 2 experts"),
    ({"demix": {"top_k_experts": -1}}, 400, None, "top_k -1"),
    ({"demix": {"switch_rate": 1.5}}, 400, None, "switch_rate 1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param", "message"), BAD)
def test_a_bad_request_is_told_what_is_wrong(server, fields, status, param, message):
    for stream in ({}, {"stream": True}):
        body = {"model": "demix", "prompt": "a", "max_tokens": 1} | fields | stream
        reply = server.request("POST", "/v1/completions", body)
        error = reply.body["error"]
        assert reply.status == status, error
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert error["param"] == param
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_what_changes_nothing_is_taken(server):
    neutral = {"best_of": 2, "n": 2, "suffix": None, "presence_penalty": 0, "logit_bias": {}}
    server.complete(prompt="a", max_tokens=1, user="me", stop=None, seed=None, **neutral)
    assert server.complete(prompt="x" * 12)["usage"]["completion_tokens"] <= 4  # 16 do not fit


BODIES = [
    (b"", 400, "the body is not JSON"),
    (b"{", 400, "the body is not JSON"),
    (b'{"temperature": NaN}', 400, "NaN is no JSON number"),
    (b"\xff{}", 400, "the body is not JSON"),
    (b"[" * 3000, 400, "the body is not JSON"),
    (b"1" * 4000, 400, "the body"),
    (b"[1]", 400, "the body must be a JSON object, not a list"),
    (b'"x"', 400, 'the body must be a JSON object, not "x"'),
    (b" " * 5000, 413, "the body is larger than 4,096 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BODIES)
def test_a_bad_body_is_refused(server, body, status, message):
    for path in ("/v1/completions", "/v1/experts/load"):
        reply = server.request("POST", path, body)
        assert (reply.status, message in reply.body["error"]["message"]) == (status, True)


def test_only_json_is_taken(server):
    reply = server.request("POST", "/v1/completions", b"{}", Content_Type="text/plain")
    assert (reply.status, reply.body["error"]["code"]) == (415, "no_json")


def test_unknown_places_and_methods_are_json_too(server):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/demix:lew", 404),
        ("GET", "/../etc/passwd", 404),
    ):
        reply = server.request(method, path)
        assert reply.status == status
        assert reply.body["error"]["message"]


def test_experts_that_cannot_come_or_go(server):
    for path, body, status, message in (
        ("load", {}, 400, 'the body must be {"name": EXPERT}'),
        ("load", {"name": "law", "x": 1}, 400, 'the body must be {"name": EXPERT}'),
        ("load", {"name": "lew"}, 400, "has no expert 'lew'; did you mean 'law'?"),
        ("load", {"name": "../law"}, 400, "has no expert '../law'"),
        ("unload", {"name": "lew"}, 404, "expert 'lew' is not served; did you mean 'law'?"),
        ("unload", {"name": "law"}, 200, ""),
        ("unload", {"name": "med"}, 409, "expert 'med' is the last one"),
        ("load", {"name": "demix:law"}, 200, ""),
    ):
        reply = server.request("POST", f"/v1/experts/{path}", body)
        assert reply.status == status, reply.body
        assert message in reply.body.get("error", {"message": ""})["message"]


def test_the_key_is_needed(server):
    for path in ("/v1/models", "/v1/completions"):
        for given, why in (("", "missing"), ("Bearer x", "wrong"), (f"Basic {KEY}", "wrong")):
            reply = server.request("GET", path, Authorization=given)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert why in reply.body["error"]["message"]
    assert server.request("GET", "/health", Authorization="").body == {"status": "ok"}
    assert server.request("GET", "/", Authorization="").status == 200
    assert server.request("GET", "/v1/models", Authorization=f"bearer {KEY}").status == 200


def test_other_names_of_this_machine_are_refused(server):
    """A page of another site that has its own name point here would send that name."""
    for host, status in (
        ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:1", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
    ):  # fmt: skip
        assert server.request("GET", "/health", Host=host).status == status
    assert b" 403 " in server.raw(b"GET /health HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n")


def test_no_other_site_may_read_answers(server):
    origin = {"Origin": "https://evil.example"}
    assert "access-control-allow-origin" not in server.request("GET", "/health", **origin).headers
    asked = origin | {"Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/v1/completions", **asked).status == 405


def test_the_page_may_run_its_own_script_only(server):
    reply = server.request("GET", "/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "innerHTML" not in reply.body
    assert "//" not in reply.body.replace("// ", "")  # no outside resource


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
HEAD += "Content-Type: application/json\r\n"


def test_a_slow_body_is_given_up(server):
    begun = time.monotonic()
    found = server.raw(f'{HEAD}Content-Length: 100\r\n\r\n{{"model"'.encode())
    assert found.startswith(b"HTTP/1.1 408 ")
    assert json.loads(found.split(b"\r\n\r\n")[1])["error"]["code"] == "slow_body"
    assert time.monotonic() - begun < 20


def test_a_body_that_never_ends_is_given_up(server):
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    found = server.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 8)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_headers_that_do_not_come_are_given_up(server):
    """Connections that say nothing, or never say all, would use up those that are allowed."""
    part = b"GET /health HTTP/1.1\r\nHost: localhost"
    assert server.raw(b"") == b""
    assert server.raw(part) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=4) as connection:
        connection.sendall(part + b"\r\n\r\n")
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
        connection.sendall(part)
        assert connection.recv(65536) == b""


def test_an_address_that_others_reach_needs_a_key(workdir, key_file, tmp_path):
    with pytest.raises(DemixError, match=r"--host 0\.0\.0\.0 can be reached by others: give --api"):
        serve(workdir, Settings(host="0.0.0.0"))
    bad = tmp_path / "key"
    with pytest.raises(DemixError, match="is no file"):
        read_api_key(bad)
    bad.write_text(KEY)
    bad.chmod(0o644)
    with pytest.raises(DemixError, match="can be read or written by others"):
        read_api_key(bad)
    bad.chmod(0o600)
    for text in ("", "short", "two words of it, long enough", "a" * 20 + "\n" + "b" * 20):
        bad.write_text(text)
        with pytest.raises(DemixError, match="16 or more printable characters"):
            read_api_key(bad)
    assert read_api_key(key_file) == KEY.encode()


def test_a_port_in_use_is_one_line(workdir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            DemixError, match=f"cannot listen on 127.0.0.1, port {port}: Address al"
        ):
            serve(workdir, Settings(port=port))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, "port must be 0 to 65535"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"max_tokens": -1}, "max_tokens must be 0 or more"),
        ({"body_timeout": 0.0}, r"body_timeout must be in \(0, 86400\]"),
        ({"request_timeout": float("nan")}, "request_timeout must be"),
        ({"max_queue": 8}, "max_choices 32 of one request would never fit max_queue 8"),
    ],
)
def test_bounds_out_of_range_are_refused(values, message):
    with pytest.raises(DemixError, match=message):
        Settings(**values).validate()
