import subprocess
import sys
import threading
from pathlib import Path

import pytest

from schemas.errors import BusyStoreError, StoreWriteError
from workers.staging import staging


def test_a_file_appears_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with staging(tmp_path, "b") as area:
        area.publish_file(b"one", tmp_path / "deep" / "file")
        area.publish_file(b"two", tmp_path / "deep" / "file")
        assert [entry.name for entry in area.folder.iterdir()] == ["lock"]
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"


def test_two_writers_of_one_batch_are_told_apart(tmp_path: Path) -> None:
    refused: list[BaseException] = []

    def second() -> None:
        try:
            with staging(tmp_path, "b"):
                pass
        except BusyStoreError as error:
            refused.append(error)

    with staging(tmp_path, "b"), staging(tmp_path, "c"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another process is writing 'b'" in str(refused[0])
    with staging(tmp_path, "b"):
        pass


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys; from pathlib import Path; from workers.staging import staging\n"
        "with staging(Path(sys.argv[1]), 'b') as area:\n"
        "    (area.folder / 'half').write_text('x'); (area.folder / 'folder').mkdir()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / ".staging" / "b" / "half").exists()
    with staging(tmp_path, "b") as area:
        assert [entry.name for entry in area.folder.iterdir()] == ["lock"]


def test_a_full_disk_is_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    limited = (
        "import resource, signal, sys; from pathlib import Path; from workers.staging import staging\n"
        "from schemas.errors import StoreWriteError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "store = Path(sys.argv[1])\n"
        "with staging(store, 'b') as area:\n"
        "    try:\n"
        "        area.publish_file(bytes(5000), store / 'file')\n"
        "    except StoreWriteError as error:\n"
        "        print(error)\n"
        "    assert [entry.name for entry in area.folder.iterdir()] == ['lock']\n"
    )
    found = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], check=True, capture_output=True, text=True)
    assert found.stdout == f"cannot write {tmp_path / 'file'}: File too large; what was recorded so far is safe\n"
    assert not (tmp_path / "file").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreWriteError, match="cannot write"), staging(tmp_path / "file", "b"):
        pass
