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
from fastadapt.export.bundle import staging as bundle_staging
from fastadapt.export.bundle.staging import place, staging
from fastadapt.locks import lock_beside
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

    def test_files_that_no_export_wrote_are_not_deleted(self, run, made, tmp_path, monkeypatch):
        bundle = shutil.copytree(made / "bundle", tmp_path / "b")
        (bundle / "golden" / "notes.txt").write_text("mine")
        monkeypatch.setattr(pipeline, "load_run", None)
        with pytest.raises(fa.InputError, match=r"holds golden/notes\.txt, which no export"):
            export_run(run, bundle, overwrite=True)
        assert (bundle / "golden" / "notes.txt").read_text() == "mine"

    def test_a_second_export_is_refused_before_any_work(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(pipeline, "load_run", None)
        with (
            lock_beside(tmp_path / "b"),
            pytest.raises(fa.InputError, match="b is being written by process"),
        ):
            export_run(run, tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    @pytest.mark.parametrize("at_once", [True, False])
    def test_old_and_new_change_places(self, made, tmp_path, monkeypatch, at_once):
        if not at_once:
            monkeypatch.setattr(bundle_staging, "exchange", lambda *paths: False)
        target = shutil.copytree(made / "bundle", tmp_path / "b")
        with staging(target) as folder:
            (folder / "new").touch()
            place(folder, target)
        assert [path.name for path in target.iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    @pytest.mark.parametrize("out", ["run", "link", "round", "file/b", "file", "/", "/proc/b"])
    def test_where_no_bundle_can_be(self, run, tmp_path, monkeypatch, out):
        monkeypatch.setattr(pipeline, "load_run", None)
        (tmp_path / "link").symlink_to("nowhere")
        (tmp_path / "round").symlink_to("round")
        (tmp_path / "file").touch()
        before = sorted(tmp_path.iterdir())
        with pytest.raises(fa.InputError):
            export_run(run, tmp_path / out, overwrite=True)
        assert sorted(tmp_path.iterdir()) == before

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
            "import tests.helpers.shallow_models\n"
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
