"""Folders of ours are told from others, and the list of a run's files is complete."""

import json

from fastadapt.train import fold_plan, run_folder, search
from fastadapt.written_folders import BUNDLE, RUN_FILES, is_bundle, is_ours


def test_the_files_of_runs_are_listed():
    assert RUN_FILES == run_folder.OURS | fold_plan.OURS | search.OURS


def test_folders_are_known_by_the_format_of_their_files(tmp_path):
    for number, (name, value, ours) in enumerate(
        [
            ("config.json", {"format": "fastadapt-adapter"}, True),
            ("settings.json", {"format": search.FORMAT}, True),
            ("manifest.json", {"format": BUNDLE}, True),
            ("manifest.json", {"name": "a web page"}, False),
            ("config.json", [1], False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(json.dumps(value))
        assert is_ours(folder) == ours
        assert is_bundle(folder) == (value == {"format": BUNDLE})
    (folder / "manifest.json").write_bytes(b"\xff{")
    assert not is_ours(folder) and not is_bundle(folder / "nowhere")
