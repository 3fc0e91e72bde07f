"""Signatures: with keys in files, over every file of a bundle, without any network."""

import shutil
import socket
import subprocess

import pytest

import fastadapt as fa
from tests.helpers.bundles import reseal
from tests.helpers.command import command, contents

# A public key that does not sign: of 512 bits, and of RSA.
RSA = """-----BEGIN PUBLIC KEY-----
MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAK4YqGMvGOSMq8ABP1dqVhwAC+unLYwG
VUzbdTlTbER8cFGuC5/cE0OsFOPou31RlGDXyuksj3Lk2rckjWwhWH0CAwEAAQ==
-----END PUBLIC KEY-----
"""
pytestmark = pytest.mark.usefixtures("no_speed")


@pytest.fixture
def keys(tmp_path):
    """Give a function from names to private keys; public ones end in .pub."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(name, curve=ec.SECP256R1, password=None):
        key = ec.generate_private_key(curve())
        hidden = form.NoEncryption() if not password else form.BestAvailableEncryption(password)
        pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden)
        (tmp_path / name).write_bytes(pem)
        public = key.public_key().public_bytes(
            form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
        )
        (tmp_path / f"{name}.pub").write_bytes(public)
        return tmp_path / name

    return make


@pytest.fixture
def signed(made, tmp_path, keys, monkeypatch, capsys):
    """A copy of a bundle that was signed by command, with no network."""
    pytest.importorskip("model_signing.signing", exc_type=ImportError)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it connects"))
    bundle = shutil.copytree(made / "bundle", tmp_path / "b [red]")
    before = contents(bundle)
    assert command(monkeypatch, "sign", bundle, "--key", keys("maker")) == 0
    assert capsys.readouterr().out == f"{bundle}/signature.json\n"
    after = contents(bundle)
    assert after.pop("signature.json") and after == before
    return bundle


def test_the_maker_is_known_by_the_key(signed, keys, tmp_path, monkeypatch, capsys):
    public = f"{tmp_path}/maker.pub"
    assert command(monkeypatch, "verify", signed, "--key", public, "--no-speed") == 0
    assert f"files are whole, and signed with {public}" in "".join(
        capsys.readouterr().out.splitlines()
    )
    from fastadapt.export.bundle.signature import check_signature

    keys("other")
    (tmp_path / "notes.txt").write_text("my key is under the mat")
    (tmp_path / "rsa.pub").write_text(RSA)
    for name, says in {
        "other.pub": "made with another key",
        "maker": "no public key of prime256v1, secp384r1 or secp521r1, but a private key: ",
        "rsa.pub": "but a public key of another kind, or a damaged one: ",
        "notes.txt": "but no key in PEM at all: ",
        "gone.pub": "does not exist",
    }.items():
        assert command(monkeypatch, "verify", signed, "--key", tmp_path / name) == 1
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
        assert "http" not in error and "object" not in error  # of a library
    for change, says in {
        "labels.txt": "Hash mismatch for 'labels.txt'$",
        "evil.pt2": "Extra files found",
        ".gitignore": "Extra files found",
    }.items():
        before = (signed / change).read_bytes() if (signed / change).exists() else None
        (signed / change).write_text("evil")
        with pytest.raises(fa.InputError, match=says):
            check_signature(signed, public)
        (signed / change).unlink() if before is None else (signed / change).write_bytes(before)
    check_signature(signed, public)
    reseal(signed, licences={"weights": None, "data": "mine"})  # whole, but not the maker's
    with pytest.raises(fa.InputError, match="does not hold for"):
        check_signature(signed, public)
    for content in (b"", b"{}", b'{"mediaType": 3}', b"\xff"):
        (signed / "signature.json").write_bytes(content)
        with pytest.raises(fa.InputError, match=r"signature.json does not hold"):
            check_signature(signed, public)
    (signed / "signature.json").unlink()
    with pytest.raises(fa.InputError, match="is not signed"):
        check_signature(signed, public)


def test_the_library_alone_checks_it(signed, tmp_path):
    import sys

    done = subprocess.run(
        [
            *(sys.executable, "-m", "model_signing", "verify", "key", str(signed)),
            *("--signature", f"{signed}/signature.json", "--public_key", f"{tmp_path}/maker.pub"),
            *("--ignore-paths", f"{signed}/signature.json"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_signed(signed, keys, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    from fastadapt.export.bundle.signature import sign_bundle

    for key, says in {
        keys("hidden", password=b"secret"): "has a password",
        keys("odd", curve=ec.SECP256K1): "no private key of prime256v1, .* of another kind",
        tmp_path / "maker.pub": "no private key of prime256v1, .* but a public key: ",
        tmp_path / "gone": "does not exist",
        tmp_path: "is a folder",
    }.items():
        with pytest.raises(fa.InputError, match=says):
            sign_bundle(signed, key)
    (signed / "notes.txt").touch()
    with pytest.raises(fa.InputError, match=r"holds notes\.txt"):
        sign_bundle(signed, tmp_path / "maker")


def test_native_code_of_a_signed_bundle_is_trusted(signed, tmp_path, monkeypatch):
    from fastadapt.export.bundle import verify

    trusted = []

    def why_not(artefact, manifest, trust):
        trusted.append(trust)

    monkeypatch.setattr(verify, "why_not_run", why_not)
    verify.verify_bundle(signed, speed=False, key=tmp_path / "maker.pub")
    verify.verify_bundle(signed, speed=False)
    assert trusted == [True, False]
