"""What travels and what does not: secrets, ignored files and links stay, equal folders make equal archives."""

import os
import shutil
import subprocess
import zipfile

import pytest

from cluster import ship
from cluster.ship import Parcel, check_names, check_size, collect, is_secret, pack, parse_size, show
from raysparse.config import ConfigError

SECRET = (
    *(".env", ".ENV", ".env.production", "prod.env", "server.pem", "tls.key", "id_rsa", "id_rsa.pub", "id_ed25519", "credentials"),
    *("credentials.json", "google-credentials.json", ".netrc", "token", "token.txt", "hf_token", "github-token", "auth_token", "api.token"),
    *(".ssh/config", "deep/.aws/config", "a/.kube/config", ".git-credentials", "secrets.yaml", "keys.kdbx", "service-account-1.json"),
    *("kaggle.json", ".kaggle/access", "home/.aws/credentials", ".netrc"),
)
HARMLESS = (
    *(
        "tokens.py",
        "tokenizer.json",
        "data/tokens.bin",
        "keys.md",
        "environment.json",
        "config.yaml",
        "monkey.py",
        "key.py",
        "envelope.txt",
    ),
    *("special_tokens_map.json", "tokenizer_config.json", "secretary.txt", "generation_config.json"),
)


def write(folder, **texts):
    for name, text in texts.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def git(folder, *words):
    done = subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["repository", "plain folder"])
def folder(request, tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    if request.param == "repository":
        git(place, "init", "-q")
    return place


@pytest.mark.parametrize("name", SECRET)
def test_secrets_are_known_by_their_names(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_like_a_secret_travels(name):
    assert is_secret(name) is None


def test_ignored_files_secrets_and_git_stay(folder):
    (folder / ".gitignore").write_text("*.bin\n/out/\n")
    (folder / "sub").mkdir()
    (folder / "sub" / ".gitignore").write_text("!keep.bin\n")
    write(folder, config="a: 1", model="1", out__log="1", sub__data="12345", sub__tls="1")
    (folder / "weights.bin").write_text("1")
    (folder / "sub" / "keep.bin").write_text("1")
    (folder / "sub" / "tls.key").write_text("PRIVATE")
    (folder / ".env").write_text("KEY=1")
    parcel = collect(folder)
    assert {name for name in parcel.files if not name.endswith(".gitignore")} == {"config", "model", "sub/data", "sub/keep.bin", "sub/tls"}
    assert parcel.files["sub/data"] == 5
    assert parcel.left_out["sub/tls.key"] == "a secret by its name (*.key)"


def test_a_tracked_secret_stays_too(tmp_path):
    git(tmp_path, "init", "-q")
    write(tmp_path, a="1", hf_token="hidden")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    write(tmp_path, b="not tracked")
    (tmp_path / "a").unlink()
    parcel = collect(tmp_path)
    assert parcel.files == {"b": 11}
    assert list(parcel.left_out) == ["hf_token"]
    assert "stays here, a secret by its name (*_token): hf_token" in show(parcel, every_file=False)


def test_links_out_of_the_folder_and_to_secrets_stay(folder, tmp_path):
    (tmp_path / "outside").write_text("hidden")
    write(folder, real="1")
    (folder / "key.pem").write_text("hidden")
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "etc").symlink_to("/etc")
    (folder / "notes").symlink_to("key.pem")
    (folder / "alias").symlink_to("real")
    os.mkfifo(folder / "pipe")
    parcel = collect(folder)
    assert set(parcel.files) == {"real", "alias"}
    assert parcel.left_out["out"] == "a link out of the folder"
    assert parcel.left_out["notes"] == "a link to key.pem, which is not shipped"
    assert "etc" in parcel.left_out


def test_a_repository_within_stays(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    write(tmp_path, a="1", other__b="2")
    git(tmp_path / "other", "add", ".")
    git(tmp_path / "other", "commit", "-qm", "x")
    parcel = collect(tmp_path)
    assert set(parcel.files) == {"a"}
    assert parcel.left_out == {"other": "a repository of its own"}


def test_a_folder_within_a_repository_ships_itself_alone(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("*.log\n")
    write(tmp_path, above="1", sub__a="1")
    (tmp_path / "sub" / "a.log").write_text("1")
    assert set(collect(tmp_path / "sub").files) == {"a"}


def test_git_s_own_stays_whoever_lists_it(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("url = https://user:password@host")
    (tmp_path / "a").write_text("1")
    monkeypatch.setattr(ship, "_git", lambda folder, *words: [".git/config", "a"])
    parcel = collect(tmp_path)
    assert set(parcel.files) == {"a"}
    assert parcel.left_out == {".git/config": "git's own"}


def test_a_broken_repository_is_an_error(tmp_path):
    (tmp_path / ".git").mkdir()
    with pytest.raises(ConfigError, match=r"Expected git to list the files of .* Got: fatal"):
        collect(tmp_path)


def test_without_git_an_unread_gitignore_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    write(tmp_path, a="1", runs__b="1")
    (tmp_path / ".hidden").write_text("1")
    assert set(collect(tmp_path).files) == {"a"}
    (tmp_path / ".gitignore").write_text("a\n")
    with pytest.raises(ConfigError, match=r"Got a folder with .gitignore files, and no git"):
        collect(tmp_path)


def test_a_checkout_of_raysparse_ships_no_raysparse(folder):
    write(folder, raysparse____main__="1", configs__a="1")
    (folder / "raysparse" / "__main__.py").write_text("1")
    (folder / "tuning").mkdir()
    (folder / "tuning" / "own.py").write_text("1")
    parcel = collect(folder)
    assert set(parcel.files) == {"configs/a"}
    assert "raysparse itself (the cluster runs what is installed there)" in set(parcel.left_out.values())


@pytest.mark.parametrize("name", ["cluster.py", "tuning/__init__.py", "raysparse.py"])
def test_what_would_hide_raysparse_is_refused(folder, name):
    write(folder, cluster__notes="no module")
    check_names(collect(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(ConfigError, match=r"Expected no module \w+ to travel: it would hide raysparse's own"):
        check_names(collect(folder))


def test_too_much_names_the_largest():
    parcel = Parcel(None, {"small": 1, "huge": 90_000_000, "large": 20_000_000}, {})
    check_size(parcel, 200_000_000)
    with pytest.raises(ConfigError, match=r"Expected at most 100\.0 MB .*Got 110\.0 MB in 3 files, the largest: huge \(90\.0 MB\), large"):
        check_size(parcel, parse_size("100MB"))


@pytest.mark.parametrize(("text", "size"), [("100MB", 100e6), ("1.5k", 1500), ("7", 7), ("0.5 GB", 5e8)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1MB", "600MB", "1TB", "1 MB 2"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match=r"Expected --max-ship such as 100MB, at most 536.9 MB"):
        parse_size(text)


def test_equal_folders_make_equal_archives(tmp_path):
    archives = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, b="2", a__c="1", job__config="mine")
        os.utime(folder / "b", (1, len(archives) + 10))
        (folder / "b").chmod(0o755)
        archives.append(tmp_path / f"{name}.zip")
        pack(collect(folder), {"job/config": "resolved"}, archives[-1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["a/c", "b", "job/config"]
        assert archive.read("job/config") == b"resolved"
        assert archive.getinfo("b").external_attr >> 16 == 0o755


def test_many_files_are_summed_up():
    parcel = Parcel(None, {f"data/{k:02}": 10 for k in range(40)} | {"a.yaml": 5}, {})
    text = show(parcel, every_file=False)
    assert "ships 41 files" in text
    assert "400 B  data/ (40 files)" in text
    assert "data/07" not in text
    assert "data/07" in show(parcel, every_file=True)
