"""Who vouches for a bundle: keys, signatures, and what is refused where they are asked for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqfraud.bundle import MANIFEST, Bundle, open_bundle, sign_bundle
from seqfraud.cli import main
from seqfraud.errors import BundleError, ConfigError
from seqfraud.signature import SIGNATURE, TrustedKeys, new_key, read_signing_key, read_trusted_keys


@pytest.fixture
def folder(cards: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cards.path, tmp_path / "bundle"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "release.key")
    return tmp_path / "release.key"


@pytest.fixture
def trusted(key: Path) -> TrustedKeys:
    return read_trusted_keys(key.with_name("release.key.pub"))


def test_a_signed_bundle_opens_and_says_by_whom(folder: Path, key: Path, trusted: TrustedKeys) -> None:
    signer = sign_bundle(folder, read_signing_key(key))
    assert open_bundle(folder, trusted).signed_by == signer
    assert open_bundle(folder).signed_by is None
    assert (folder / SIGNATURE).read_text().startswith(f"ed25519 {signer} ")


def test_an_unsigned_bundle_is_refused_where_a_signature_is_asked_for(folder: Path, trusted: TrustedKeys) -> None:
    with pytest.raises(BundleError, match=r"not signed: there is no manifest\.sig; .*release\.key\.pub asks for"):
        open_bundle(folder, trusted)


def test_a_manifest_that_was_changed_after_it_was_signed_is_refused(
    folder: Path, key: Path, trusted: TrustedKeys
) -> None:
    """A space is enough: the signature is over bytes, not over what they mean."""
    sign_bundle(folder, read_signing_key(key))
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" ")
    open_bundle(folder)
    with pytest.raises(BundleError, match=r"manifest\.sig: the signature of key [0-9a-f]{16} is not one of this manif"):
        open_bundle(folder, trusted)


def test_the_signature_of_another_bundle_is_refused(
    folder: Path, plain: Bundle, key: Path, trusted: TrustedKeys, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(plain.path, tmp_path / "other"))
    sign_bundle(other, read_signing_key(key))
    shutil.copy(other / SIGNATURE, folder / SIGNATURE)
    with pytest.raises(BundleError, match="is not one of this manifest"):
        open_bundle(folder, trusted)


def test_a_stranger_is_not_trusted_alone_and_does_no_harm_beside_another(
    folder: Path, key: Path, trusted: TrustedKeys, tmp_path: Path
) -> None:
    new_key(tmp_path / "stranger.key")
    stranger = sign_bundle(folder, read_signing_key(tmp_path / "stranger.key"))
    with pytest.raises(BundleError, match=f"signed by {stranger}; none of them is in .*release.key.pub"):
        open_bundle(folder, trusted)
    signer = sign_bundle(folder, read_signing_key(key))
    assert open_bundle(folder, trusted).signed_by == signer
    assert open_bundle(folder, read_trusted_keys(tmp_path / "stranger.key.pub")).signed_by == stranger
    sign_bundle(folder, read_signing_key(key))  # again: replaced, not added
    assert len((folder / SIGNATURE).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "signed by nobody"),
        ("rsa a b\n", "'rsa a b' is no signature"),
        ("\x00\xff" * 50, "is no signature"),
        ("ed25519 KEY !!!\n", "is not one of this manifest"),
        ("ed25519 KEY\n", "is no signature"),
        ("x" * 100_000, r"manifest\.sig has 100,000 bytes; at most 65,536"),
    ],
)
def test_a_file_that_is_no_signature_is_refused(folder: Path, trusted: TrustedKeys, content: str, message: str) -> None:
    (folder / SIGNATURE).write_bytes(content.replace("KEY", next(iter(trusted.keys))).encode("latin-1"))
    with pytest.raises(BundleError, match=message):
        open_bundle(folder, trusted)


def test_a_private_key_is_its_owners_only_and_is_never_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    content = key.read_bytes()
    with pytest.raises(ConfigError, match="cannot be made: File exists"):
        new_key(key)
    assert key.read_bytes() == content
    assert "BEGIN" not in repr(read_signing_key(key))
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 0640 lets others read a private key; expected 0600: chmod 600"):
        read_signing_key(key)


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="is no private key in PEM"):
        read_signing_key(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# none yet\n", "holds no key"),
        ("\ned25519 AAAA\n", "line 2: expected ed25519 and a public key of 32 bytes"),
        ("ssh-ed25519 AAAA me\n", "line 1: expected"),
        ("ed25519\n", "line 1: expected"),
    ],
)
def test_a_file_of_keys_that_holds_none_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    """Not "nobody is asked for": a file that lost its content would let everything in."""
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trusted_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trusted_keys(tmp_path / "absent")


def test_a_file_may_hold_several_keys_and_comments(tmp_path: Path, key: Path) -> None:
    new_key(tmp_path / "b.key")
    lines = [key.with_name("release.key.pub").read_text(), "# the old one", (tmp_path / "b.key.pub").read_text()]
    (tmp_path / "keys").write_text("\n".join(lines))
    assert len(read_trusted_keys(tmp_path / "keys").keys) == 2


def test_the_commands_make_keys_sign_and_refuse(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, keys = tmp_path / "my.key", str(tmp_path / "my.key.pub")
    assert main(["sign", "--new-key", str(key)]) == 0
    assert main(["sign", str(folder)]) == 2
    assert main(["sign", str(folder), "--key", str(key), "--new-key", "x"]) == 2
    commands = [
        ["verify", str(folder)],
        ["score", str(folder), "nothing.csv", "--out", "scores.parquet"],
        ["load", "nothing.csv", "--bundle", str(folder), "--state", str(tmp_path / "state")],
        ["serve", "--bundle", str(folder), "--state", str(tmp_path / "state")],
    ]
    for command in commands:
        capsys.readouterr()
        assert main([*command, "--trusted-keys", keys]) == 2
        assert "not signed: there is no manifest.sig" in capsys.readouterr().err
    file = tmp_path / "serve.toml"
    file.write_text(f"[bundle]\ntrusted_keys = {json.dumps(keys)}\n")
    assert main([*commands[-1], "--settings", str(file)]) == 2
    assert "not signed" in capsys.readouterr().err
    assert main(["sign", str(folder), "--key", str(key)]) == 0
    for command in commands[:3]:  # past the signature, and on to what is wrong next
        main([*command, "--trusted-keys", keys])
        assert "sign" not in capsys.readouterr().err


def test_signing_changes_nothing_but_the_signature_and_a_spoilt_bundle_is_not_signed(folder: Path, key: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    sign_bundle(folder, read_signing_key(key))
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.pop(SIGNATURE)
    assert after == before
    (folder / SIGNATURE).unlink()
    (folder / "step.onnx").write_bytes(b"spoilt")
    with pytest.raises(BundleError, match=r"step\.onnx is not the file"):
        sign_bundle(folder, read_signing_key(key))
    assert not (folder / SIGNATURE).exists()


def test_without_keys_nothing_of_cryptography_is_imported(folder: Path) -> None:
    """It belongs to the service; scoring a file needs none of it."""
    code = "import sys; from pathlib import Path; from seqfraud.bundle import open_bundle; import seqfraud.commands\n"
    code += "open_bundle(Path(sys.argv[1])); assert 'cryptography' not in sys.modules and 'onnx' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_where_cryptography_is_not_installed_one_line_says_so(
    folder: Path, key: Path, trusted: TrustedKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for asked in (lambda: open_bundle(folder, trusted), lambda: read_signing_key(key), lambda: new_key(key)):
        with pytest.raises(ConfigError, match=r"signatures need the package cryptography.*seqfraud\[serve\]"):
            asked()
