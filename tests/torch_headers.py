"""Gets the headers and the names of the C functions of a PyTorch release's stable ABI, without installing it.

    python -m tests.torch_headers    fetches the oldest and the newest supported release into .cache/torch-headers

It reads 65 MB of a wheel of 400 MB, by HTTP range requests. It uses the wheels for AArch64, which are the smallest for
Linux. Headers and names are the same for every processor.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import torch

CACHE = Path(__file__).parents[1] / ".cache/torch-headers"
RELEASES = {"oldest": "torch==2.11.0", "newest": "torch"}  # as pip takes them
FOLDERS = "torch/csrc/stable", "torch/csrc/inductor/aoti_torch", "torch/headeronly"
LIBRARIES = "libtorch_cpu.so", "libc10.so"


class Unreachable(Exception):
    """A release cannot be fetched. The message gives the reason."""


class RemoteFile(io.RawIOBase):
    """A file on a web server. Only the parts that are read are fetched."""

    def __init__(self, url):
        self.url, self.position = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer):
        last = min(self.position + len(buffer), self.size) - 1
        if last < self.position:
            return 0
        wanted = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-{last}"})
        with urllib.request.urlopen(wanted) as answer:
            if answer.status != 206:
                raise Unreachable(f"the server of {self.url} does not answer range requests")
            data = answer.read()
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def find(requirement):
    """The version and the address of the wheel that pip would take."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        command += ["--report", str(report), "--target", folder, "--only-binary=:all:", "--python-version=3.12"]
        command += ["--platform=manylinux_2_28_aarch64", requirement]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise Unreachable(f"pip finds no {requirement}: {run.stderr.strip().splitlines()[-1]}")
        (found,) = json.loads(report.read_text())["install"]
    return found["metadata"]["version"], found["download_info"]["url"]


def exported(library):
    """The names of the C functions that a library exports and that begin with torch_ or aoti_torch_."""
    names = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r" [TWDBRV] ((?:aoti_)?torch_\w+)", names))


def fetch(requirement):
    """The folder of a release in the cache. It is fetched if it does not exist."""
    version, url = find(requirement)
    if (CACHE / version).exists():
        return CACHE / version
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=CACHE) as folder, zipfile.ZipFile(opened(url)) as wheel:
            names = sorted(wheel.namelist(), key=lambda name: wheel.getinfo(name).header_offset)
            headers = tuple(f"torch/include/{folder}/" for folder in FOLDERS)
            wheel.extractall(Path(folder) / version, [name for name in names if name.startswith(headers)])
            symbols = {s for name in LIBRARIES for s in exported(wheel.extract(f"torch/lib/{name}", folder))}
            (Path(folder) / version / "symbols.txt").write_text("\n".join(sorted(symbols)))
            (Path(folder) / version).rename(CACHE / version)
    except OSError as error:
        raise Unreachable(f"{url}: {error}") from error
    return CACHE / version


def opened(url):
    if url.startswith("file:"):
        return urllib.request.url2pathname(urllib.parse.urlparse(url).path)
    return io.BufferedReader(RemoteFile(url), 1 << 20)


class Release:
    """One release of PyTorch: where its headers are, and the C functions that its libraries export."""

    def __init__(self, include, symbols):
        self.include, self.symbols = include, symbols

    @classmethod
    def installed(cls):
        folder = Path(torch.__file__).parent
        return cls(folder / "include", {s for name in LIBRARIES for s in exported(folder / "lib" / name)})

    @classmethod
    def cached(cls, which, allow_fetch):
        """The oldest or the newest release. Raises Unreachable if it is neither in the cache nor can be fetched.

        Without `allow_fetch`, nothing is fetched, and the newest release is the newest one in the cache.
        """
        if allow_fetch:
            folder = fetch(RELEASES[which])
        elif which == "newest":
            folder = max(CACHE.glob("[0-9]*"), key=lambda path: tuple(map(int, path.name.split("."))), default=None)
        else:
            folder = CACHE / RELEASES[which].split("==")[1]
        if folder is None or not folder.exists():
            raise Unreachable("it is not in .cache/torch-headers, which `make torch-headers` fills")
        return cls(folder / "torch/include", set((folder / "symbols.txt").read_text().split()))


def main():
    try:
        print(*(fetch(requirement) for requirement in RELEASES.values()), sep="\n")
    except Unreachable as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
