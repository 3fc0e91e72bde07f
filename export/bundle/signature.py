"""A maker's signature over a bundle: who made it, where hashes only say that it is whole.

``signature.json`` in the bundle is a detached signature in the format of the OpenSSF's model
signing (a Sigstore bundle around an in-toto statement), made and checked by the library
``model-signing`` with elliptic keys in files. It lists every other file of the folder with its
SHA-256; nothing is fetched or sent. Whoever has the library can check it without fastadapt::

    model_signing verify key BUNDLE --signature BUNDLE/signature.json --public_key maker.pub \
        --ignore-paths BUNDLE/signature.json

and ``--ignore-paths BUNDLE/measured.json`` once ``verify --measure`` wrote that.
"""

from __future__ import annotations

import ast
import getpass
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError, first_line
from fastadapt.files import write_text
from fastadapt.locks import lock_beside

from .consistency import check_consistency
from .manifest import MANIFEST, SIGNATURE, check_accepted, check_files, read_manifest
from .measured import MEASURED
from .staging import check_nothing_else

CURVES = "prime256v1, secp384r1 or secp521r1"


def sign_bundle(bundle: str | Path, key: str | Path) -> Path:
    """Sign all files of a bundle; a signature that is there is replaced.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        key: file of a private key of an elliptic curve, in PEM; a password is asked for.

    Returns:
        The signature's file.

    Raises:
        InputError: the bundle is damaged, or holds files that its manifest does not list; the key
            is none; ``model-signing`` is not installed.
    """
    bundle = Path(bundle)
    _check_key(key)
    library = _library()
    signer = library.signing.Config()
    password = _password(key)
    try:
        signer.use_elliptic_key_signer(private_key=key, password=password)
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{key} is no private key of {CURVES}, but {_what_is(key, 'private', password)}: make "
            "one with openssl ecparam -name prime256v1 -genkey -noout -out FILE"
        ) from None
    with lock_beside(bundle.resolve()):
        manifest = read_manifest(bundle)
        check_accepted(bundle, manifest)
        check_files(bundle, manifest)
        check_consistency(bundle, manifest)
        check_nothing_else(bundle, {MANIFEST, SIGNATURE, MEASURED, *manifest["files"]})
        signer.set_hashing_config(_hashing(library, bundle))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / SIGNATURE
            signer.sign(bundle, file)
            write_text(bundle / SIGNATURE, file.read_text(encoding="utf-8"))
    return bundle / SIGNATURE


def check_signature(bundle: str | Path, key: str | Path) -> None:
    """Check that a bundle is, file by file, what the owner of a key signed.

    Args:
        bundle: the folder.
        key: file of the maker's public key, in PEM.

    Raises:
        InputError: it has no signature, or one of another key; a file was changed, added or
            removed since; the key is none; ``model-signing`` is not installed.
    """
    bundle = Path(bundle)
    _check_key(key)
    library = _library()
    verifier = library.verifying.Config()
    try:
        verifier.use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{key} is no public key of {CURVES}, but {_what_is(key, 'public')}: openssl ec -in "
            "KEY -pubout -out FILE writes the one of a private key"
        ) from None
    if not (bundle / SIGNATURE).is_file():
        raise InputError(f"{bundle} is not signed: it has no {SIGNATURE}")
    verifier.set_hashing_config(_hashing(library, bundle))
    try:
        verifier.verify(bundle, bundle / SIGNATURE)
    except Exception as error:  # the library's parsers raise what they like
        raise InputError(
            f"{bundle / SIGNATURE} does not hold for {key}: {_why_not(error)}"
        ) from None


def _check_key(key: str | Path) -> None:
    if not Path(key).is_file():
        what = "is a folder" if Path(key).is_dir() else "does not exist"
        raise InputError(f"{key} {what}; expected the file of a key")


def _what_is(key: str | Path, wanted: str, password: bytes | None = None) -> str:
    """Say what a file is that is not the wanted kind of key, by its first line of PEM."""
    try:
        text = Path(key).read_text(encoding="ascii", errors="replace")
    except OSError:
        return "a file that cannot be read"
    found = re.search(r"-----BEGIN (?:[A-Z0-9]+ )*?(PRIVATE KEY|PUBLIC KEY|CERTIFICATE)-----", text)
    if found is None:
        return "no key in PEM at all"
    kind = found[1].lower()
    if not kind.startswith(wanted):
        return f"a {kind}"
    if password is not None:
        return "one that this password does not open, or one of another kind"
    return f"a {kind} of another kind, or a damaged one"


def _why_not(error: Exception) -> str:
    """Say why a signature does not hold, by what the library raised."""
    said = first_line(error)
    if type(error).__name__ == "InvalidSignature" or "Key mismatch" in said:
        return "it was made with another key, or changed"
    start = "Signature mismatch: "
    try:
        reasons = ast.literal_eval(said.removeprefix(start)) if said.startswith(start) else []
    except (ValueError, SyntaxError):
        return "files were changed, added or removed since"
    if not reasons:
        return "it is damaged, or none of this kind"
    # After a file's name come both hashes, as Python writes them.
    return "; ".join(str(reason).partition(": Expected 'Digest(")[0] for reason in reasons)


def _hashing(library: Any, bundle: Path) -> Any:
    """Hash every file but the signature and speeds of other machines, those of Git too."""
    config = library.hashing.Config()
    ignored = [bundle / SIGNATURE, bundle / MEASURED]
    return config.set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _password(key: str | Path) -> bytes | None:
    """Ask for the password of a private key that has one."""
    try:
        encrypted = "ENCRYPTED" in Path(key).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None  # what reads the key says so
    if not encrypted:
        return None
    if not sys.stdin.isatty():
        raise InputError(f"{key} has a password, which is asked for at a terminal only")
    return getpass.getpass(f"password of {key}: ").encode()


def _library() -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise InputError(
            f"signatures need {error.name}, which is not installed: pip install 'fastadapt[sign]'"
        ) from None
    return model_signing
