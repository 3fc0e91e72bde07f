import errno
import shutil
import signal
import subprocess
import sys
import time

import pytest

import fastadapt as fa
from fastadapt.export import export_run
from fastadapt.export.bundle import golden, material, pipeline
from fastadapt.export.bundle.staging import staging
from tests.helpers.command import command, contents

pytestmark = pytest.mark.usefixtures("no_speed")


class TestTarget:
    def test_existing_bundle_needs_overwrite(self, run, made, tmp_path, monkeypatch, quick):
        shutil.copytree(made / "bundle", tmp_path / "b")
        monkeypatch.setattr(pipeline, "load_run", None)
        with pytest.raises(fa.InputError, match="b exists: replace it with `overwrite=True`"):
            export_run(run, tmp_path / "b")
        monkeypatch.undo()

    def test_overwrite_replaces_it(self, run, made, tmp_path, quick):
        shutil.copytree(made / "bundle", tmp_path / "b")
        (tmp_path / "b" / "labels.txt").write_text("old")
        export_run(run, tmp_path / "b", overwrite=True)
        assert (tmp_path / "b" / "labels.txt").read_text() == "crack\ngood\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_what_is_no_bundle_is_never_replaced(self, run, tmp_path, overwrite):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(fa.InputError, match="mine exists and is no bundle"):
            export_run(run, tmp_path / "mine", overwrite=overwrite)
        with pytest.raises(fa.InputError, match="run exists and is no bundle"):
            export_run(run, run, overwrite=overwrite)

    @pytest.mark.parametrize(
        "step", ["export_onnx", "build_artefacts", "write_tensors", "render_report", "write_json"]
    )
    def test_full_disk_leaves_what_was_there(
        self, run, made, tmp_path, monkeypatch, quick, capsys, step
    ):
        shutil.copytree(made / "bundle", tmp_path / "b")
        kept = contents(tmp_path / "b")

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", "b/golden.safetensors")

        module = next(m for m in (material, golden, pipeline) if hasattr(m, step))
        monkeypatch.setattr(module, step, full)
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b", "--overwrite") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no space left on the disk of" in error
        assert contents(tmp_path / "b") == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_a_kill_in_the_middle_leaves_no_half_bundle(self, run, tmp_path, how, quick):
        code = (
            "import sys, time; from fastadapt.export.bundle import material\n"
            "def slow(folded, path, **kwargs): path.touch(); time.sleep(600)\n"
            "material.export_onnx = slow\n"
            "from fastadapt import cli; cli.main()"
        )
        args = [sys.executable, "-c", code, "export", str(run), "--out", str(tmp_path / "b")]
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 300
            while not list(tmp_path.glob(".b.*/model.onnx")) and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            # Another export of the same name leaves what is in use alone.
            with staging(tmp_path / "b"):
                assert list(tmp_path.glob(".b.*/model.onnx"))
            process.send_signal(how)
            _, error = process.communicate(timeout=300)
        finally:
            process.kill()
        assert not (tmp_path / "b").exists()
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert "Traceback" not in error
            assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        else:
            assert len(list(tmp_path.glob(".b.*.tmp"))) == 1
            export_run(run, tmp_path / "b")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    def test_a_kill_between_two_names_brings_the_bundle_back(self, made, tmp_path):
        old = shutil.copytree(made / "bundle", tmp_path / ".b.abcd1234.tmp.old")
        kept = contents(old)
        for name in (".b.2.abcd1234.tmp", ".c.abcd1234.tmp", ".b.mine.tmp"):  # others'
            (tmp_path / name).mkdir()
        with staging(tmp_path / "b"):
            assert contents(tmp_path / "b") == kept
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"b", ".b.2.abcd1234.tmp", ".c.abcd1234.tmp", ".b.mine.tmp"}
        shutil.copytree(made / "bundle", old)
        with staging(tmp_path / "b"):
            assert not old.exists()
