"""Lines that a disk refuses come later, in order, and no half line stays."""

from lorafit.training.logging.run_logs import LineFile


def test_a_disk_that_refuses_gets_the_lines_later_and_in_order(tmp_path):
    file = LineFile(tmp_path / "gone" / "lines")
    file.append("one\n")
    file.append("two\n")
    assert file.flush() is False
    file.path.parent.mkdir()
    file.append("three\n")
    assert file.path.read_text() == "one\ntwo\nthree\n"


def test_what_was_half_written_is_cut_off(tmp_path):
    path = tmp_path / "lines"
    file = LineFile(path)
    file.append("one\n")
    path.write_text("one\ntw")
    file.append("two\n")
    assert path.read_text() == "one\ntwo\n"


def test_a_file_is_gone_on_with_behind_its_last_whole_line(tmp_path):
    path = tmp_path / "lines"
    path.write_text("one\ntw")
    file = LineFile(path)
    file.continue_file()
    file.append("two\n")
    assert path.read_text() == "one\ntwo\n"


def test_a_file_that_somebody_removed_is_known_to_be(tmp_path):
    file = LineFile(tmp_path / "lines")
    assert file.is_whole
    file.append("one\n")
    assert file.is_whole
    file.path.unlink()
    assert not file.is_whole


def test_what_somebody_removed_or_cut_leaves_no_gap_of_zeros(tmp_path):
    file = LineFile(tmp_path / "lines")
    for line in ("one\n", "two\n"):
        file.append(line)
    file.path.write_text("one\ntw")
    file.append("three\n")
    assert file.path.read_text() == "one\nthree\n"
    file.path.unlink()
    file.append("four\n")
    assert file.path.read_text() == "four\n"
