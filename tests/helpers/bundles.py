"""Bundles that tests change: their manifests are sealed again, as an honest maker would."""

from pathlib import Path

from fastadapt.export.bundle.manifest import MANIFEST, list_files
from fastadapt.files import read_json, seal, write_json


def reseal(bundle, list_again=True, **changes):
    """Change keys of a manifest, list the folder's files, and hash all of it again."""
    bundle = Path(bundle)
    manifest = {**read_json(bundle / MANIFEST), **changes}
    if list_again and "files" not in changes:
        manifest["files"] = list_files(bundle)
    manifest = seal(manifest) if manifest["schema"] >= 3 else manifest
    write_json(bundle / MANIFEST, manifest)
    return manifest
