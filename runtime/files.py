"""Files that are complete or absent: reading text and JSON, atomic writes, the lock and the seal of a folder.

In:  paths and values. Out: values and files. Every failure is a ValueError of one line that names the file
and the remedy. Pure Python, so that the benchmark scorers, which import it, need no torch.

A file is written under a temporary name, fsynced and renamed (`atomically`). A folder is sealed by
manifest.json, which is written last and holds the size and the SHA-256 of every other file.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path


def tolerant_output():
    """Let stdout and stderr print what they cannot encode as an escape such as \\u2192. For every `main`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caller may have put another object in its place
            stream.reconfigure(errors="backslashreplace")


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}); is the name right?") from None


def parse_json(text, place, hint="is the file complete?"):
    """The value of a JSON text; `place` is the file, or file and line, that an error names."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); {hint}") from None


def read_json(path):
    """The JSON object in a file of a model or run folder."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}); is the folder complete?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def atomically(path):
    """Yield a temporary path to write to. It is fsynced and renamed to `path` at the end, or removed after an
    error, so that `path` never holds half a file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone already, or its folder could not be made
            temporary.unlink()


def write_text(path, text):
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write JSON. A lone surrogate, which JSON may hold and UTF-8 may not, is written as an escape."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode())


@contextlib.contextmanager
def writing(path):
    """Turn an OSError into a ValueError that names the file: the error of a full disk has no name in it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None


def fsync(path):
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(folder):
    """Lock a run folder against a second process. The lock lasts until the returned file is closed or the
    process dies. A file system without locks only prints a warning."""
    file = open(folder / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is at work on this run; wait until it ends, or choose "
                         "another --out") from None
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run there")
    return file


def seal(folder):
    """Fsync every file of a folder, subfolders included, then write manifest.json with sizes and hashes."""
    files = {}
    for file in sorted(folder.rglob("*")):
        fsync(file)
        if file.is_file():
            files[file.relative_to(folder).as_posix()] = [file.stat().st_size, digest(file)]
    write_json(folder / "manifest.json", files)
    fsync(folder)


def check_seal(folder):
    """Raise ValueError, saying what is wrong, unless a folder holds exactly what was sealed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = [(name, size, hexadecimal) for name, (size, hexadecimal) in manifest.items()]
    except OSError as error:
        raise ValueError(f"no manifest.json, which is written last ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        files = []
    if not files:
        raise ValueError("its manifest.json is damaged, or not one of ours")
    for name, size, hexadecimal in files:
        file = folder / name
        if file.is_absolute() != folder.is_absolute() or ".." in file.parts or not file.is_file():
            raise ValueError(f"no file {name!r} in it, which its manifest names")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, but {size} were saved")
        if digest(file) != hexadecimal:
            raise ValueError(f"{name} is damaged: its hash is not that of what was saved")


def digest(path):
    """The SHA-256 of a file, in hexadecimal."""
    hashed = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            hashed.update(block)
    return hashed.hexdigest()


def git_revision():
    """The commit of this code, with "+changes" where the tree differs; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        output = [subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout
                  for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output[0].strip() + ("+changes" if output[1].strip() else "")
