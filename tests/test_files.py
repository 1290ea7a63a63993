"""files.py: what a kill leaves behind, and where a user's line is wrong."""

import os
import subprocess

import pytest

from common import files


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(tmp_path / "a.json", "x" * 10_000 + "\ud800")
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with files.whole_folder(target) as part:
        (part / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), files.whole_folder(target) as part:
        (part / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1" and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_all_files_of_a_folder_can_be_read_by_who_can_read_one(tmp_path):
    with files.whole_folder(tmp_path / "out") as part:
        for name, mode in (("config.json", 0o644), ("model.safetensors", 0o600)):
            (part / name).write_text("1")
            (part / name).chmod(mode)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_log_torn_in_the_middle_of_a_line_goes_on_behind_it(tmp_path):
    log = tmp_path / "log.jsonl"
    for rows in ([{"a": 1}, {"a": 2}], [{"a": 3}]):
        with log.open("a") as file:
            for row in rows:
                files.append(file, row)
        log.write_text(log.read_text()[:-3])            # a kill in the last write
    with log.open("a") as file:
        files.append(file, {"a": 4})
    log.write_bytes(log.read_bytes() + b'\n{"a": "\xe2\x80')                    # and one inside a character
    assert list(files.rows(log)) == [{"a": 1}, {"a": 4}] and list(files.rows(tmp_path / "none")) == []


@pytest.mark.parametrize(("line", "says"), [("{", "line 3: not JSON"), ("[1]", "line 3: not an object"),
                                            ('"\u2028"', "line 3: not an object"), ("[" * 100_000, "line 3: not JSON"),
                                            ('{"text": "\\ud800"}', "line 3: ")])
def test_a_wrong_line_of_a_users_file_is_named_by_its_number(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one\u2028line"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        list(files.numbered(path, "text"))


@pytest.mark.parametrize("name, flag, meant", [
    ("train.py", "--mehtod", "--method"), ("evaluate.py", "--persona", "--personas"), ("rollout.py", "--temprature",
    "--temperature"), ("tasks.py", "--limt", "--limit"), ("rewards.py", "--anser", "--answer")])
def test_a_mistyped_flag_is_one_line_with_the_flag_that_was_meant(script, name, flag, meant):
    done = script(name, flag, "x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{name}: ") and f"did you mean {meant}?" in done.stderr


@pytest.mark.parametrize("name, flag, meant", [
    ("train.py", "--lr", "--learning-rate"), ("train.py", "--num_generations", "--group-size"),
    ("train.py", "--beta", "--kl-coef"), ("evaluate.py", "--problems", "--limit"), ("train.py", "--gpus", None),
    ("train.py", "--n", None)])
def test_a_flag_of_another_program_is_told_by_its_name_here_and_nothing_far_is_guessed(script, name, flag, meant):
    said = script(name, flag, "8").stderr
    assert (f"did you mean {meant}?" in said) == bool(meant) == ("did you mean" in said)


def test_the_commit_says_whether_files_were_changed_since_and_without_git_there_is_none(tmp_path, monkeypatch):
    for word in (["init"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-m", "a"]):
        (tmp_path / "files.py").touch()
        subprocess.run(["git", *word], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    clean = files.commit()
    (tmp_path / "files.py").write_text("changed")
    assert len(clean) == 40 and files.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert files.commit() == ""


def test_what_is_written_whole_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def sync(descriptor):
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    files.write_atomically(tmp_path / "a", "1")
    assert seen == [("a.part", False), (tmp_path.name, True)]
    (tmp_path / "a").unlink()
    with files.whole_folder(tmp_path / "a") as part:
        (part / "b").write_text("1")
    assert seen[2:] == [("b", False), (".a.part", False), (tmp_path.name, True)]
