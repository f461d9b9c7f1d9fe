import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloured import Coloured, draw, predict, table_of
from dualrefnet.deploy.batch import Cases, FileCases, ResultFile, Summary, csv_lines
from dualrefnet.errors import DataError
from dualrefnet.runtime.prediction import Prediction


def interrupt(cases: Cases, out: Path, folder: Path, after: int) -> None:
    """Predict, and stop in the middle of batch number `after`."""

    class Stopping(Coloured):
        def predict_arrays(self, prepared: Any, metadata: Any) -> list[Prediction]:
            if len(self.batches) == after:
                raise KeyboardInterrupt
            return super().predict_arrays(prepared, metadata)

    with pytest.raises(KeyboardInterrupt):
        predict(Stopping(), cases, out, folder)


def test_what_was_interrupted_goes_on_and_ends_the_same_to_the_byte(tmp_path: Path) -> None:
    names = [f"{number:02}.png" for number in range(14)]
    draw(tmp_path / "photos", names)
    (tmp_path / "photos" / "03.png").write_text("broken")
    model = Coloured()
    cases = FileCases([tmp_path / "photos"], None, model)
    out, folder = tmp_path / "out.csv", tmp_path / "m"
    predict(model, cases, tmp_path / "whole.csv", folder)
    whole = (tmp_path / "whole.csv").read_bytes()
    for after, lost in ((0, 0), (1, 3), (2, 0), (3, 1)):
        interrupt(cases, out, folder, after)
        partial_file = out.with_name("out.csv.partial")
        # A machine that loses its power may lose a part of the last line, too.
        with partial_file.open("r+b") as file:
            file.truncate(partial_file.stat().st_size - lost)
        assert not out.exists()
        with pytest.raises(
            DataError, match=r"--resume goes on with it; to begin anew, remove it and .*out\.csv\.partial\.json"
        ):
            predict(model, cases, out, folder)
        again = Coloured()
        assert predict(again, cases, out, folder, resume=True) == Summary(13, 1, 4 * (after - bool(lost)))
        assert out.read_bytes() == whole
        # Whole batches are repeated, never parts of them; the first holds the broken picture.
        assert again.batches == [3, 4, 4, 2][after - bool(lost) :]
        with pytest.raises(DataError, match="finished and nothing is left to resume"):
            predict(model, cases, out, folder, resume=True)
        assert predict(model, cases, out, folder).resumed == 0
        out.unlink()


def test_another_model_list_or_batch_is_not_gone_on_with(tmp_path: Path) -> None:
    draw(tmp_path / "photos", [f"{number}.png" for number in range(6)])
    forms = table_of(tmp_path / "forms.csv", [("image", "age"), ("1", "61")])
    model = Coloured()
    out, folder = tmp_path / "out.csv", tmp_path / "m"

    def resume(**options: Any) -> Summary:
        return predict(model, FileCases([tmp_path / "photos"], forms, model), out, folder, resume=True, **options)

    interrupt(FileCases([tmp_path / "photos"], forms, model), out, folder, 1)
    (folder / "model.safetensors").write_text("other numbers")
    with pytest.raises(DataError, match="since this has changed: model; call as before"):
        resume()
    (folder / "model.safetensors").unlink()
    (folder / "metrics.json").write_text("measured again")
    with pytest.raises(DataError, match="changed: batch"):
        resume(batch=5)
    draw(tmp_path / "photos", ["7.png"])
    with pytest.raises(DataError, match="changed: images, rows"):
        resume()
    (tmp_path / "photos" / "7.png").unlink()
    forms.write_text("image,age\n1,62\n")
    with pytest.raises(DataError, match="changed: metadata"):
        resume()
    forms.write_text("image,age\n1,61\n")
    description = out.with_name("out.csv.partial.json")
    kept = description.read_text()
    description.unlink()
    with pytest.raises(DataError, match="isn't known what"):
        resume()
    description.write_text(kept)
    assert resume() == Summary(6, 0, 4)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    first = ResultFile(tmp_path / "out.csv", ["image", "error"], {}, 2, 1, resume=False)
    with first, pytest.raises(DataError, match="another process is writing"):
        ResultFile(tmp_path / "out.csv", ["image", "error"], {}, 2, 1, resume=True)


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with ResultFile(tmp_path / "out.csv", ["image", "error"], {}, 1, 1, resume=False) as result:
        result.append(b"a,\n", 0)
        with pytest.raises(DataError, match="free some space and run again with --resume"):
            result.finish()
    assert (tmp_path / "out.csv.partial").read_bytes() == b"image,error\na,\n"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=1, max_size=9),
    batch=st.integers(1, 4),
    data=st.data(),
)
def test_a_file_cut_anywhere_keeps_whole_batches_of_whole_rows(
    rows: list[tuple[str, str]], batch: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("cut") / "out.csv"
    # Lone surrogates are written as escapes; carriage returns are quoted as line feeds are.
    rows = [(name or "x", error.strip().replace("\n", " ").replace("\r", " ")) for name, error in rows]
    with ResultFile(out, ["image", "error"], {}, len(rows), batch, resume=False) as result:
        result.append(csv_lines(rows), 0)
    content = result.partial.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    result.partial.write_bytes(content[:cut])
    ends = [len(csv_lines([("image", "error"), *rows[:number]])) for number in range(len(rows) + 1)]
    whole = sum(end <= cut for end in ends) - 1
    kept = whole if whole == len(rows) else max(0, whole) // batch * batch
    with ResultFile(out, ["image", "error"], {}, len(rows), batch, resume=True) as again:
        assert again.kept == kept
        assert again.failed == sum(bool(error) for _, error in rows[:kept])
    assert result.partial.read_bytes() == content[: ends[kept]]


def test_a_killed_process_is_resumed_by_the_next(tmp_path: Path) -> None:
    draw(tmp_path / "photos", [f"{number:03}.png" for number in range(160)])
    (tmp_path / "m").mkdir()
    code = (
        "import sys; from pathlib import Path; from coloured import Coloured, predict; from dualrefnet.deploy.batch import FileCases; "
        "model = Coloured(seconds=0.02); "
        "folder = Path(sys.argv[1]); "
        "print(predict(model, FileCases([folder / 'photos'], None, model), folder / 'out.csv', folder / 'm', resume=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.Popen(command, env=environment)
    partial_file = tmp_path / "out.csv.partial"
    deadline = time.monotonic() + 60
    while (not partial_file.exists() or partial_file.read_bytes().count(b"\n") < 30) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.csv").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept = int(done.stdout.rsplit("resumed=", 1)[1].rstrip(")\n"))
    assert kept >= 28
    assert kept % 4 == 0
    model = Coloured()
    predict(model, FileCases([tmp_path / "photos"], None, model), tmp_path / "whole.csv", tmp_path / "m")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
