"""The command ``fastadapt sign``."""

from __future__ import annotations

from fastadapt.cli.options import Given, command
from fastadapt.export.settings import SignSettings
from fastadapt.interrupt import working


@command(SignSettings)
def sign(given: Given) -> None:
    """Sign a bundle with a key of yours; verify --key then shows that you made it."""
    settings = given.build(SignSettings)

    from fastadapt.export.bundle.signature import sign_bundle

    with working():
        print(sign_bundle(settings.bundle, settings.key))
