"""API keys: the file, the door, and the command that makes them."""

import hashlib
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, cast
from wsgiref.types import WSGIEnvironment

import pytest

import serve.app
from seqfraud.bundle import Bundle
from seqfraud.cli import main
from seqfraud.errors import ConfigError, RequestError
from serve.app import ServiceLike, create_app
from serve.keys import LABEL, SCORE, Keyring, add_key, key_from, read_keys, revoke_key
from serve.limits import LimitSettings, RateLimiter
from serve.pages import Page
from serve.service import Service as ScoringService

NOW = 1_700_000_000.0


class Times:
    """A clock and a monotonic clock that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def times() -> Times:
    return Times()


def ring(file: Path, times: Times) -> Keyring:
    return Keyring(file, clock=times, monotonic=times)


def bearer(key: str) -> WSGIEnvironment:
    return {"HTTP_AUTHORIZATION": f"Bearer {key}"}


def status(keys: Keyring, environ: WSGIEnvironment, roles: Any = SCORE) -> int:
    """200, or what the request is refused with."""
    try:
        keys.admit(environ, roles)
    except RequestError as error:
        return error.status
    return 200


# ---- the file


def test_a_key_is_256_random_bits_and_the_file_has_its_hash_only(file: Path) -> None:
    stored, text = add_key(file, ["score"], NOW, note="checkout")
    prefix, identity, secret = text.split("_")
    assert (prefix, identity, len(bytes.fromhex(secret))) == ("sfk", stored.id, 32)
    content = file.read_text()
    assert secret not in content
    assert hashlib.sha256(text.encode()).hexdigest() in content
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert add_key(file, ["score"], NOW)[1] != text
    assert read_keys(file)[0] == stored


def test_a_revoked_key_stays_in_the_file(file: Path) -> None:
    first, second = (add_key(file, ["label"], NOW)[0] for _ in range(2))
    revoke_key(file, first.id, NOW + 5)
    revoke_key(file, first.id, NOW + 9)  # the first time counts
    states = {key.id: (key.state(NOW), key.revoked) for key in read_keys(file)}
    assert states == {first.id: ("revoked", "2023-11-14T22:13:25Z"), second.id: ("in force", None)}
    with pytest.raises(ConfigError, match="there is no key 'nobody'"):
        revoke_key(file, "nobody", NOW)


def test_a_file_that_was_opened_to_a_group_stays_so(file: Path) -> None:
    """A service that runs as another user goes on reading it."""
    add_key(file, ["score"], NOW)
    file.chmod(0o640)
    add_key(file, ["score"], NOW)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [one.name for one in file.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    add_key(file, ["score"], NOW)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="others than its owner may write it"):
        read_keys(file)


HASH = "0" * 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a file of keys"),
        ("[" * 100_000, "not a file of keys"),
        ('{"format": 2, "keys": []}', "not a file of keys"),
        ('{"format": 1, "keys": [{"id": "a"}]}', "missing required field"),
        ('{"format": 1, "keys": [], "more": 1}', "unknown field"),
        (f'{{"format": 1, "keys": [{{"id": "a", "roles": ["god"], "sha256": "{HASH}", "created": ""}}]}}', "god"),
        (f'{{"format": 1, "keys": [{{"id": "a", "roles": [], "sha256": "{HASH}", "created": ""}}]}}', "at least one"),
        ('{"format": 1, "keys": [{"id": "a", "roles": ["score"], "sha256": "0", "created": ""}]}', "64 hexadecimal"),
        (
            f'{{"format": 1, "keys": [{{"id": "a", "roles": ["score"], "sha256": "{HASH}", "created": "", "expires": "x"}}]}}',
            "not an ISO 8601",
        ),
        (
            '{"format": 1, "keys": ['
            + ",".join([f'{{"id": "a", "roles": ["score"], "sha256": "{HASH}", "created": ""}}'] * 2)
            + "]}",
            "twice",
        ),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(file: Path, content: str, words: str) -> None:
    file.touch(0o600)
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"keys\.json") as caught:
        read_keys(file)
    assert words in str(caught.value)


# ---- the door


def test_a_key_opens_what_its_role_is_for(file: Path, times: Times) -> None:
    stored, key = add_key(file, ["score"], NOW)
    admin, both = add_key(file, ["admin"], NOW)[1], add_key(file, ["score", "label"], NOW)[1]
    keys = ring(file, times)
    environ = bearer(key)
    assert status(keys, environ, SCORE) == 200
    assert environ["seqfraud.key"] == stored.id
    environ = bearer(key)
    assert status(keys, environ, LABEL) == 403
    assert environ["seqfraud.key"] == stored.id, "the log says whose key was not enough"
    for text in (admin, both):
        assert [status(keys, bearer(text), roles) for roles in (SCORE, LABEL)] == [200, 200]


def test_the_headers_that_carry_a_key(file: Path, times: Times) -> None:
    key = add_key(file, ["score"], NOW)[1]
    keys = ring(file, times)
    for good in (
        bearer(key),
        {"HTTP_AUTHORIZATION": f"bearer  {key} "},
        {"HTTP_X_API_KEY": key},
        {"HTTP_AUTHORIZATION": "Basic dTpw", "HTTP_X_API_KEY": key},  # a proxy's own
    ):
        assert status(keys, good) == 200
    for bad in (
        {},
        {"HTTP_AUTHORIZATION": key},
        {"HTTP_AUTHORIZATION": f"Basic {key}"},
        {"QUERY_STRING": f"key={key}"},
    ):
        assert status(keys, cast(WSGIEnvironment, bad)) == 401


def test_what_is_nearly_a_key_is_none(file: Path, times: Times) -> None:
    first, second = (add_key(file, ["score"], NOW)[1] for _ in range(2))
    keys = ring(file, times)
    other_secret = first[:17] + second[17:]
    flipped = first[:-1] + ("0" if first[-1] != "0" else "1")
    for text in (
        "",
        "sfk_",
        first[:-1],
        first + "0",
        first.upper(),
        other_secret,
        flipped,
        first[4:],
        "é" * 81,
        "x" * 10**6,
    ):
        assert status(keys, bearer(text)) == 401, text[:100]
    assert status(keys, bearer(first)) == status(keys, bearer(second)) == 200


def test_unknown_wrong_expired_and_revoked_get_the_same_words(file: Path, times: Times) -> None:
    """And none says whether its id exists."""
    good = add_key(file, ["score"], NOW)[1]
    short = add_key(file, ["score"], NOW, expires="2023-11-14T22:13:30Z")[1]
    gone, revoked = add_key(file, ["score"], NOW)
    revoke_key(file, gone.id, NOW)
    times.now = NOW + 9.999
    keys = ring(file, times)
    assert status(keys, bearer(short)) == 200
    times.now = NOW + 10
    words = set()
    for text in (short, revoked, good[:-1] + "g", "sfk_" + "0" * 12 + good[16:]):
        with pytest.raises(RequestError) as caught:
            keys.admit(bearer(text), SCORE)
        words.add((caught.value.status, caught.value.code, caught.value.message))
    assert len(words) == 1
    assert next(iter(words))[0] == 401


def test_a_file_without_a_key_in_force_is_an_error_at_the_start(file: Path, times: Times) -> None:
    stored, _ = add_key(file, ["score"], NOW)
    add_key(file, ["score"], NOW, expires="2023-11-14T22:13:30Z")
    revoke_key(file, stored.id, NOW)
    times.now = NOW + 60
    with pytest.raises(ConfigError, match=r"no key that is in force; make one with `seqfraud keys add"):
        ring(file, times)
    with pytest.raises(ConfigError, match="cannot be read"):
        ring(file.with_name("absent"), times)


# ---- while it runs


def test_a_changed_file_counts_after_a_second(file: Path, times: Times) -> None:
    stored, old = add_key(file, ["score"], NOW)
    keys = ring(file, times)
    new = add_key(file, ["score"], NOW)[1]
    revoke_key(file, stored.id, NOW)
    times.now += 0.9
    assert (status(keys, bearer(old)), status(keys, bearer(new))) == (200, 401), "it is looked at once a second"
    times.now += 0.2
    assert (status(keys, bearer(old)), status(keys, bearer(new))) == (401, 200)


@pytest.mark.parametrize("harm", ["broken", "removed", "open to all"])
def test_a_broken_file_keeps_the_keys_and_is_said_once(
    file: Path, times: Times, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(file, ["score"], NOW)[1]
    whole = file.read_bytes()
    keys = ring(file, times)
    if harm == "removed":
        file.unlink()
    elif harm == "broken":
        file.write_text("{")
    else:
        file.chmod(0o666)
    for _ in range(3):
        times.now += 1.5
        assert status(keys, bearer(key)) == 200
    assert caplog.text.count("the keys stay what they were") == 1
    file.unlink(missing_ok=True)
    file.touch(0o600)
    file.write_bytes(whole.replace(b'"score"', b'"label"'))
    times.now += 1.5
    assert status(keys, bearer(key)) == 403, "the mended file is read"


def test_a_file_without_keys_closes_the_door_of_a_running_service(file: Path, times: Times) -> None:
    stored, key = add_key(file, ["score"], NOW)
    keys = ring(file, times)
    revoke_key(file, stored.id, NOW)
    times.now += 1.5
    assert status(keys, bearer(key)) == 401


# ---- the app


class Service:
    """Answers everything, and says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object) -> bytes:
            self.asked.append(name)
            return b"{}"

        return answer

    engine = None

    @property
    def desk(self) -> "Service":
        return self

    def ready(self) -> bool:
        return True

    def degraded(self) -> bool:
        return False


class Pages:
    """Pages of no bundle."""

    def __init__(self, *_: object, **__: object) -> None:
        self.document = self.page = self.style = Page(b"{}", "application/json")

    def of(self, *_: object) -> "Pages":
        return self


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.app, "Description", Pages)


ROUTES = [
    ("POST", "/v1/score", "score", {"score", "admin"}),
    ("POST", "/v1/score/batch", "score_batch", {"score", "admin"}),
    ("POST", "/v1/labels", "add_labels", {"label", "admin"}),
    ("GET", "/v1/transactions/1", "transaction", {"score", "label", "admin"}),
    ("HEAD", "/v1/transactions/1", "transaction", {"score", "label", "admin"}),
    ("GET", "/v1/transactions/1/explanation", "explanation", {"label", "admin"}),
    ("GET", "/v1/users/1", "user", {"label", "admin"}),
    ("GET", "/v1/alerts", "alerts", {"label", "admin"}),
    ("GET", "/v1/alerts/1", "alert", {"label", "admin"}),
    ("POST", "/v1/alerts/1", "change_alert", {"label", "admin"}),
    ("GET", "/v1/outbox", "outbox", {"admin"}),
    ("POST", "/v1/outbox/dead/1", "settle_dead_letter", {"admin"}),
    ("GET", "/v1/model", "model", {"score", "admin"}),
    ("POST", "/v1/model", "change_model", {"admin"}),
    ("GET", "/v1/rules", "rules", {"admin"}),
    ("POST", "/v1/rules/test", "test_rule", {"admin"}),
    ("GET", "/v1/rules/a", "rule", {"admin"}),
    ("PUT", "/v1/rules/a", "put_rule", {"admin"}),
    ("DELETE", "/v1/rules/a", "delete_rule", {"admin"}),
    ("GET", "/v1/rules/a/history", "rule_history", {"admin"}),
    ("GET", "/v1/lists", "lists", {"admin"}),
    ("GET", "/v1/lists/a", "list", {"admin"}),
    ("PUT", "/v1/lists/a", "put_list", {"admin"}),
    ("DELETE", "/v1/lists/a", "delete_list", {"admin"}),
    ("POST", "/v1/lists/a/entries", "add_entries", {"admin"}),
    ("DELETE", "/v1/lists/a/entries", "remove_entries", {"admin"}),
    ("GET", "/v1/lists/a/history", "list_history", {"admin"}),
    ("GET", "/healthz", None, {"score", "label", "metrics", "admin", None}),
    ("GET", "/readyz", None, {"score", "label", "metrics", "admin", None}),
    ("GET", "/metrics", "metrics", {"metrics", "admin"}),
    ("GET", "/openapi.json", None, {"score", "label", "metrics", "admin", None}),
    ("GET", "/docs", None, {"score", "label", "metrics", "admin", None}),
    ("GET", "/docs/style.css", None, {"score", "label", "metrics", "admin", None}),
]


def ask(app: Any, method: str, path: str, key: str | None, stream: Any) -> tuple[int, dict[str, str], bytes]:
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(stream.getvalue())),
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": stream,
        "wsgi.errors": io.StringIO(),
        **({} if key is None else bearer(key)),
    }
    started: list[tuple[str, dict[str, str]]] = []
    body = b"".join(app(environ, lambda s, h, *_: started.append((s, dict(h)))))
    return int(started[0][0][:3]), started[0][1], body


@pytest.mark.parametrize(("method", "path", "asked", "allowed"), ROUTES)
@pytest.mark.parametrize("role", ["score", "label", "metrics", "admin", None])
def test_every_route_takes_the_roles_it_is_for(
    file: Path, method: str, path: str, asked: str | None, allowed: set[str | None], role: str | None
) -> None:
    key = add_key(file, [role or "score"], NOW)[1] if role else None
    add_key(file, ["admin"], NOW)
    service, stream = Service(), io.BytesIO(b"{}")
    app = create_app(cast(ServiceLike, service), keys=Keyring(file, clock=lambda: NOW))
    status, headers, body = ask(app, method, path, key, stream)
    if role in allowed:
        assert (status, service.asked) == (200, [asked] if asked else [])
        return
    assert (status, service.asked) == (401 if role is None else 403, [])
    assert stream.tell() == 0, "nothing of the body was read"
    assert headers["content-type"] == "application/json"
    assert ("www-authenticate" in headers) == (status == 401)
    if method != "HEAD":
        error = json.loads(body)["error"]
        assert error["code"] == ("unauthorized" if role is None else "forbidden")


def test_the_routes_of_the_app_are_all_in_this_table() -> None:
    """A new route has to say here who may use it."""
    from serve.hug_compat import hug

    made: list[Any] = []
    real = hug.API

    def remember(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        return made[-1]

    hug.API = remember
    try:
        create_app(cast(ServiceLike, Service()))
    finally:
        hug.API = real
    urls = {url for urls in made[0].http.routes.values() for url in urls}
    names = {"transactions": "transaction_id", "users": "user", "alerts": "transaction_id", "dead": "seq"}
    assert urls == {
        re.sub(
            r"/a(?=/|$)", "/{name}", re.sub(r"(\w+)/1(?=/|$)", lambda found: f"{found[1]}/{{{names[found[1]]}}}", path)
        )
        for _, path, *_ in ROUTES
    }


def test_without_keys_everybody_may_do_everything() -> None:
    app = create_app(cast(ServiceLike, Service()))
    assert {ask(app, method, path, None, io.BytesIO(b"{}"))[0] for method, path, *_ in ROUTES} == {200}


def test_the_author_of_a_label_is_the_id_of_its_key(file: Path, cards: Bundle, tmp_path: Path) -> None:
    entry, key = add_key(file, ["label"], NOW)
    with ScoringService(cards, tmp_path / "state") as service:
        app = create_app(service, keys=Keyring(file, clock=lambda: NOW))
        said = b'[{"transaction_id": "t1", "is_fraud": true, "source": "analyst"}]'
        assert ask(app, "POST", "/v1/labels", key, io.BytesIO(said))[0] == 200
        label = service.journal.last_label("t1")
        assert label is not None
        assert (label.source, label.author) == ("analyst", entry.id)


def test_a_rate_limit_counts_each_key_by_itself_and_strangers_not_at_all(file: Path) -> None:
    first, second = add_key(file, ["score"], NOW)[1], add_key(file, ["score"], NOW)[1]
    limiter = RateLimiter(LimitSettings(requests_per_second=1e-6, burst=2))
    service = Service()
    app = create_app(cast(ServiceLike, service), keys=Keyring(file, clock=lambda: NOW), limiter=limiter)

    def post(key: str | None) -> tuple[int, dict[str, str], bytes]:
        return ask(app, "POST", "/v1/score", key, io.BytesIO(b"{}"))

    assert [post("sfk_unknown")[0] for _ in range(3)] == [401] * 3
    assert [post(first)[0] for _ in range(3)] == [200, 200, 429]
    status, headers, body = post(first)
    assert (status, json.loads(body)["error"]["code"]) == (429, "too_many_requests")
    assert int(headers["retry-after"]) > 1000
    assert [post(second)[0] for _ in range(3)] == [200, 200, 429]
    assert ask(app, "GET", "/healthz", first, io.BytesIO())[0] == 200
    assert service.asked == ["score"] * 4


# ---- the command, and the client's side


def test_the_command_prints_a_key_once_alone_and_lists_without_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "keys",
        "add",
        "--file",
        str(file),
        "--role",
        "score",
        "--role",
        "label",
        "--expires",
        "90d",
        "--note",
        "a b",
    ]
    assert main(words) == 0
    printed = capsys.readouterr()
    key = printed.out.strip()
    assert printed.out == f"{key}\n"
    assert main(["keys", "list", "--file", str(file)]) == 0
    listed = capsys.readouterr().out
    assert key.split("_")[2] not in listed
    assert "score+label" in listed and "in force" in listed and "a b" in listed
    assert main(["keys", "revoke", key.split("_")[1], "--file", str(file)]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json", "--file", str(file)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["roles"]) == ("revoked", ["score", "label"])
    assert "sha256" not in row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add"], "--role"),
        (["add", "--role", "god"], "'god' is not one of score, label, metrics, admin"),
        (["add", "--role", "score", "--expires", "2020-01-01"], "is past"),
        (["add", "--role", "score", "--expires", "soon"], "--expires: 'soon'"),
        (["add", "abc", "--role", "score"], "expected an ID with revoke"),
        (["revoke"], "expected an ID with revoke"),
        (["list", "--role", "score"], "are for add"),
        (["list"], "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(
    file: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *words, "--file", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert not file.exists()


def test_a_client_takes_its_key_from_a_file_or_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (add_key(file, ["score"], NOW)[1] for _ in range(2))
    monkeypatch.delenv("SEQFRAUD_API_KEY", raising=False)
    assert key_from(None) is None
    monkeypatch.setenv("SEQFRAUD_API_KEY", other)
    assert key_from(None) == other
    held = file.with_name("key")
    held.write_text(f"{one}\n")
    assert key_from(held) == one
    held.write_text("hunter2")
    with pytest.raises(ConfigError, match="holds no key") as caught:
        key_from(held)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        key_from(file.with_name("absent"))


def test_two_that_add_at_once_lose_nothing(file: Path) -> None:
    children = []
    for _ in range(4):
        pid = os.fork()
        if not pid:
            for _ in range(5):
                add_key(file, ["score"], NOW)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert len(read_keys(file)) == 20
