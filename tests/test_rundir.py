"""The run directory: files whole or not at all, the same bytes for the same content, and one run in one directory."""

import errno
import logging
import os
import time

import numpy as np
import pytest

from harp_hf.errors import RunDirError
from harp_hf.rundir import RunDir

MANIFEST = {
    "pool": "p", "proxy": "q", "model": ["m", {"r": 16}, None], "features": "tfidf",
    "settings": {"leaf_size": 12, "learning_rate": 0.03, "null_scores": None}, "versions": {"trl": "1.0"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "deep" / "run")


def names(run):
    return sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "error", [ValueError("bad row"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(run, error):
    def half(handle):
        handle.write(b"ne")
        raise error

    run.write("a.bin", lambda handle: handle.write(b"old"))
    with pytest.raises(type(error)):
        run.write("a.bin", half)
    assert run.file("a.bin").read_bytes() == b"old"
    assert names(run) == ["a.bin"]


def test_a_writer_that_fails_the_first_time_leaves_no_file(run):
    def half(handle):
        handle.write(b"ne")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(RunDirError, match=r"a.bin cannot be written: Input/output error\.$"):
        run.write("deeper/a.bin", half)
    assert names(run) == []


def test_a_file_is_on_the_disk_before_it_gets_its_name(run, monkeypatch):
    events = []
    fsync, replace = os.fsync, type(run.path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(type(run.path), "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    run.write("a.bin", lambda handle: handle.write(b"whole"))
    assert events == ["fsync", "rename"]
    assert run.file("a.bin").read_bytes() == b"whole"


def test_a_file_may_be_read_by_whom_the_user_lets(run):
    before = os.umask(0o027)
    try:
        run.write("a.bin", lambda handle: handle.write(b"whole"))
    finally:
        os.umask(before)
    assert run.file("a.bin").stat().st_mode & 0o777 == 0o640


def test_what_is_written_is_read_back(run):
    value = {"ä": [1, None, 0.1], "b": {"c": True}}
    run.write_json("v.json", value)
    assert run.read_json("v.json") == value
    run.write_arrays("deep/v.npz", a=np.arange(6).reshape(2, 3), b=np.float32(0.5), c=np.array("word"))
    read = run.read_arrays("deep/v.npz")
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b"].dtype == np.float32
    assert str(read["c"]) == "word"


def test_equal_arrays_give_equal_bytes_at_any_time(run, monkeypatch):
    arrays = {"a": np.arange(1000.0), "b": np.array("reason")}
    first = run.write_arrays("first.npz", **arrays).read_bytes()
    later = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(later))
    assert run.write_arrays("again.npz", **arrays).read_bytes() == first
    assert run.write_arrays("other.npz", **arrays | {"b": np.array("reasons")}).read_bytes() != first


def test_equal_values_give_equal_json_in_any_order(run):
    first = run.write_json("a.json", {"a": 1, "b": 2}).read_bytes()
    assert run.write_json("b.json", {"b": 2, "a": 1}).read_bytes() == first


class Trap:
    """An object whose unpickling would be noticed."""

    sprung = False

    def __reduce__(self):
        return (_spring, ())


def _spring():
    Trap.sprung = True


def test_pickles_are_neither_written_nor_read(run):
    np.savez(run.file("trap.npz"), a=np.array([Trap()], dtype=object))
    np.save(run.file("trap.npy"), np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(RunDirError, match=r"trap\.npz is damaged"):
        run.read_arrays("trap.npz")
    with pytest.raises(RunDirError, match=r"trap\.npy is damaged"):
        run.read_matrix("trap.npy")
    assert not Trap.sprung


def test_a_file_that_is_not_there(run):
    for read in (run.read_json, run.read_arrays, run.read_matrix):
        with pytest.raises(RunDirError, match=r"run holds no finished run: a\.file is not there\.$"):
            read("a.file")


def test_looking_into_a_directory_changes_nothing(tmp_path):
    RunDir(tmp_path)
    assert not list(tmp_path.iterdir())


# claim()


@pytest.fixture
def claimed(run):
    run.claim(MANIFEST)
    run.write_arrays("hierarchy.npz", a=np.arange(3))
    return run


def test_the_same_run_claims_its_directory_again(claimed):
    before = claimed.file("manifest.json").read_bytes()
    claimed.claim(MANIFEST)
    claimed.claim(MANIFEST | {"versions": {"trl": "2.0"}})
    assert claimed.file("manifest.json").read_bytes() == before, "versions are recorded, not compared"


def test_a_manifest_with_tuples_is_that_with_lists(run):
    run.claim(MANIFEST | {"model": ("tiny", {"targets": ("q", "v")})})
    run.write_arrays("hierarchy.npz", a=np.arange(3))
    run.claim(MANIFEST | {"model": ["tiny", {"targets": ["q", "v"]}]})
    run.claim(MANIFEST | {"model": ("tiny", {"targets": ("q", "v")})})
    with pytest.raises(RunDirError, match="another model"):
        run.claim(MANIFEST | {"model": ("tiny", {"targets": ("q",)})})


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ("pool", "with another pool;"),
        ("proxy", "with another proxy set;"),
        ("model", "with another model, adapter or tokenizer;"),
        ("features", "with another choice of features;"),
    ],
)
def test_another_run_is_told_what_differs(claimed, section, match):
    before = claimed.file("manifest.json").read_bytes()
    with pytest.raises(RunDirError, match=f"{match} use another `output_dir`, or delete this one to start afresh"):
        claimed.claim(MANIFEST | {section: "other"})
    assert claimed.file("manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"leaf_size": 20}, "was made with leaf_size=12, not 20;"),
        ({"learning_rate": 0.1}, "was made with learning_rate=0.03, not 0.1;"),
        ({"null_scores": [0.5]}, r"was made with null_scores=None, not \[0.5\];"),
        ({"new_setting": "a"}, "was made with new_setting=None, not 'a';"),
        ({"leaf_size": 20, "learning_rate": 0.1}, "was made with leaf_size=12"),
    ],
)
def test_another_setting_is_named_with_both_values(claimed, settings, match):
    with pytest.raises(RunDirError, match=match):
        claimed.claim(MANIFEST | {"settings": MANIFEST["settings"] | settings})


def test_a_setting_that_is_gone_is_named_too(claimed):
    with pytest.raises(RunDirError, match=r"was made with leaf_size=12, not None;"):
        claimed.claim(MANIFEST | {"settings": {"learning_rate": 0.03}})


@pytest.mark.parametrize("computed", ["features.npy", "base.npz", "measurements/3-42.npz"])
def test_a_run_that_computed_nothing_has_no_claim(run, computed):
    run.claim(MANIFEST)
    run.claim(MANIFEST | {"pool": "other"})
    assert run.read_json("manifest.json")["pool"] == "other"
    run.write(computed, lambda handle: handle.write(b"something"))
    with pytest.raises(RunDirError, match="another pool"):
        run.claim(MANIFEST)


# Damaged files


def flips(old):
    """The bytes with one bit changed, each byte in turn."""
    for place in range(len(old)):
        yield old[:place] + bytes([old[place] ^ (1 << place % 8)]) + old[place + 1 :]


def cuts(old):
    return (old[:length] for length in range(0, len(old), 7))


@pytest.fixture
def silent():
    """Thousands of warnings are not kept."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("silent")
def test_no_changed_or_missing_byte_of_an_npz_file_goes_unnoticed(run):
    arrays = {"scores": np.arange(2.0), "reason": np.array("")}
    path = run.write_arrays("a.npz", **arrays)
    whole, noticed = path.read_bytes(), 0
    assert run.holds("a.npz")
    for damaged in [*flips(whole), *cuts(whole)]:
        path.write_bytes(damaged)
        if run.holds("a.npz"):  # a byte that says nothing, such as the time in a zip file
            read = run.read_arrays("a.npz")
            assert read.keys() == arrays.keys()
            assert all(read[name].tobytes() == arrays[name].tobytes() for name in arrays)
        else:
            noticed += 1
    assert noticed > 0.8 * len(whole)


@pytest.mark.usefixtures("silent")
def test_no_changed_or_missing_byte_of_a_json_file_goes_unnoticed(run):
    value = {"a": [1, 0.5, "ä"], "b": {"c": None}}
    path = run.write_json("a.json", value)
    whole = path.read_bytes()
    for damaged in [*flips(whole), *cuts(whole)]:
        path.write_bytes(damaged)
        if run.holds("a.json"):  # white space, or the name of the checksum
            assert {name: part for name, part in run.read_json("a.json").items() if name in value} == value


@pytest.mark.usefixtures("silent")
def test_no_changed_or_missing_byte_of_an_npy_file_goes_unnoticed(run):
    path = run.write_matrix("a.npy", lambda handle: np.save(handle, np.ones((3, 2), np.float32)))
    whole = path.read_bytes()
    assert run.holds("a.npy")
    for damaged in [*flips(whole), *cuts(whole)]:
        path.write_bytes(damaged)
        assert not run.holds("a.npy")


def test_the_checksum_of_a_matrix_is_one_that_sha256sum_checks(run):
    import subprocess

    run.write_matrix("a.npy", lambda handle: np.save(handle, np.ones(3)))
    command = ["sha256sum", "--check", "a.npy.sha256"]
    done = subprocess.run(command, cwd=run.path, capture_output=True, text=True)
    assert done.stdout == "a.npy: OK\n"


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(run, monkeypatch):
    path = run.write_json("a.json", {"a": 1})

    def refuse(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(RunDirError, match=r"a\.json cannot be read: Permission denied\.$"):
        run.read_json("a.json")


def test_keys_that_json_turns_into_text_keep_their_checksum(run):
    run.write_json("a.json", {"b": {10: 1, 9: 2}, "sha256": "of another file"})
    assert run.read_json("a.json") == {"b": {"10": 1, "9": 2}}
