"""The tool that kills a prediction at random points, with few paths and kills."""

import json

from tools import million_paths


def test_killed_runs_write_what_one_run_writes(tmp_path, capsys):
    file = tmp_path / "counts.json"
    assert million_paths.main(["--count", "12000", "--kills", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["rows"], found["unreadable"], found["rows_twice"]) == (11_988, 12, 0)
    assert len(found["killed_at_parts"]) == 3 and found["parts"] == 12
    assert found["same_bytes"] and found["same_unreadable"]
    assert set(found["peak_mib"]) == {"10000", "12000"}
