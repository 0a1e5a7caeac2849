"""What a submission takes along: the files of a folder that git does not ignore, without secrets, listed, and as one archive."""

import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from raysparse.config import ConfigError
from raysparse.report import bytes_text

SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.asc"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd"),
    *("credentials*", "*credentials.json", ".git-credentials", "client_secret*", "service-account*.json", "service_account*.json"),
    *("secret", "secret.*", "secrets", "secrets.*", "*.secret", "*.secrets", "*password*.txt", "kubeconfig*", "*.kubeconfig", "*.tfstate*"),
    *("token", "token.txt", "token.json", "*.token", "*_token", "*-token", "*_token.txt", "*-token.txt", "auth_token*", ".vault*"),
    *("kaggle.json", ".kaggle", ".s3cfg", ".boto", ".dockercfg", "rclone.conf", ".my.cnf"),
    *(".ssh", ".aws", ".azure", ".gcloud", ".config", ".gnupg", ".kube", ".docker", ".ray", ".huggingface"),
)
"""Never shipped: names of files and folders at any depth, in any case (`fnmatch`); of a folder everything below it."""

UNTRACKED = (".*", "__pycache__", "*.pyc", "venv", "env", "node_modules", "runs", "build", "dist", "*.egg-info", "*.so", "wandb")
"""Not shipped from a folder that is in no git repository, beside what its .gitignore files name."""

OWN = ("raysparse", "tuning", "cluster")
"""Packages of raysparse, in a checkout of it. The cluster runs those that are installed there, with their native kernels."""

RAY_LIMIT = 512 << 20
"""Ray refuses larger archives."""


@dataclass(frozen=True)
class Parcel:
    """What travels.

    Attributes:
        folder: where the files are.
        files: path below the folder -> bytes.
        left_out: path below the folder -> why it stays, of those that git would have taken.
    """

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str]

    @property
    def size(self) -> int:
        return sum(self.files.values())


def collect(folder: Path) -> Parcel:
    """What a submission from `folder` takes along; nothing is read but names and sizes."""
    folder = folder.resolve()
    in_repository = any((above / ".git").exists() for above in (folder, *folder.parents))
    names = sorted(set(_from_git(folder, in_repository)))
    if not in_repository:
        names = [name for name in names if not _matches(name, UNTRACKED)]
    own = OWN if (folder / "raysparse" / "__main__.py").exists() else ()
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if reason := _why_not(folder, name, own):
            left_out[name.rstrip("/")] = reason
        elif (folder / name).exists():  # git still lists what was deleted
            files[name] = (folder / name).stat().st_size
    for name in [name for name in files if (folder / name).is_symlink()]:
        target = (folder / name).resolve().relative_to(folder).as_posix()
        if target not in files:
            left_out[name] = f"a link to {target}, which is not shipped"
            del files[name]
    return Parcel(folder, files, left_out)


def check_size(parcel: Parcel, limit: int) -> None:
    """Raise a `ConfigError` that names the largest files if there is more than `limit` bytes."""
    if parcel.size <= limit:
        return
    largest = sorted(parcel.files.items(), key=lambda item: -item[1])[:5]
    raise ConfigError(
        f"Expected at most {bytes_text(limit)} to ship from {parcel.folder}. Got {bytes_text(parcel.size)} in {len(parcel.files):,} files, "
        f"the largest: {', '.join(f'{name} ({bytes_text(size)})' for name, size in largest)}. "
        "Put data on storage that the cluster reaches, name the files in .gitignore, or raise --max-ship."
    )


def check_names(parcel: Parcel) -> None:
    """Raise a `ConfigError` for a module that would stand before raysparse's own of that name: Ray puts the folder first on the path."""
    for name in OWN:
        for module in (f"{name}.py", f"{name}/__init__.py"):
            if module in parcel.files:
                raise ConfigError(
                    f"Expected no module {name} to travel: it would hide raysparse's own on the cluster. Got {parcel.folder / module}. "
                    "Give it another name, name it in .gitignore, or submit from another folder."
                )


def parse_size(text: str) -> int:
    """'100MB', '1.5 GB' or plain bytes; at most what Ray takes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)B?\s*", text)
    size = int(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]) if found else None
    if size is None or size > RAY_LIMIT:
        raise ConfigError(f"Expected --max-ship such as 100MB, at most {bytes_text(RAY_LIMIT)}, which Ray takes. Got {text!r}. Correct it.")
    return size


def show(parcel: Parcel, every_file: bool) -> str:
    """The files with their sizes, and what stays; folders summed up unless every file is asked for or they are few."""
    sizes: dict[str, list[int]] = {}
    for name, size in parcel.files.items():
        top = name if every_file or len(parcel.files) <= 30 or "/" not in name else f"{name.split('/')[0]}/"
        sizes.setdefault(top, []).append(size)
    lines = [f"ships {len(parcel.files):,} files of {parcel.folder}, {bytes_text(parcel.size)}:"]
    for top, found in sizes.items():
        lines.append(f"  {bytes_text(sum(found)):>10}  {top}{f' ({len(found):,} files)' if top.endswith('/') else ''}")
    stays: dict[str, list[str]] = {}
    for name, reason in parcel.left_out.items():
        stays.setdefault(reason, []).append(name)
    for reason, names in stays.items():
        lines.append(f"stays here, {reason}: {', '.join(names[:5])}{f' and {len(names) - 5:,} more' if len(names) > 5 else ''}")
    return "\n".join(lines)


def pack(parcel: Parcel, extra: Mapping[str, str], to: Path) -> None:
    """Write the archive; equal contents give equal bytes, which Ray then uploads once.

    Args:
        extra: path -> text of files that the submission adds, in place of any of that name.
    """
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted({*parcel.files, *extra}):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            runs = name not in extra and os.access(parcel.folder / name, os.X_OK)
            entry.external_attr = (0o755 if runs else 0o644) << 16
            archive.writestr(entry, extra[name] if name in extra else _read(parcel.folder / name))


def is_secret(name: str) -> str | None:
    """The pattern that a path's name, or that of a folder on it, matches; None: no secret that we know of."""
    return next((pattern for pattern in SECRETS if _matches(name, (pattern,))), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(part.lower(), pattern) for part in PurePosixPath(name).parts for pattern in patterns)


def _why_not(folder: Path, name: str, own: tuple[str, ...]) -> str | None:
    path = folder / name
    if ".git" in PurePosixPath(name).parts:
        return "git's own"
    if pattern := is_secret(name):
        return f"a secret by its name ({pattern})"
    if PurePosixPath(name).parts[0] in own:
        return "raysparse itself (the cluster runs what is installed there)"
    if path.is_symlink() and not path.resolve().is_relative_to(folder):
        return "a link out of the folder"
    if path.is_dir():
        return "a repository of its own" if not path.is_symlink() else "a link to a folder"
    return "no plain file" if path.exists() and not path.is_file() else None


def _from_git(folder: Path, in_repository: bool) -> Iterator[str]:
    """Tracked files, and others that no .gitignore names. A folder in no repository is listed by one that is made for the moment."""
    if shutil.which("git") is None:
        if in_repository or next(folder.rglob(".gitignore"), None) is not None:
            raise ConfigError(
                f"Expected git, to know what {folder} ignores. Got a folder with .gitignore files, and no git. "
                "Install git, or submit from a folder that holds only what shall travel."
            )
        yield from (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
        return
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if in_repository:
        yield from _git(folder, *listing)
        return
    with tempfile.TemporaryDirectory() as scratch:
        _git(folder, "init", "--quiet", "--bare", scratch)
        yield from _git(folder, f"--git-dir={scratch}", f"--work-tree={folder}", *listing)


def _git(folder: Path, *words: str) -> list[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, errors="surrogateescape", check=False)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["nothing"])[0]
        raise ConfigError(
            f"Expected git to list the files of {folder}. Got: {problem}. Mend the repository, or submit from another folder."
        )
    return [name for name in done.stdout.split("\0") if name]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Expected to read {path}, which is to be shipped. Got: {error.strerror}. Mend it, or name it in .gitignore."
        ) from None
