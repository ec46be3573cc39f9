"""Give every pin of some requirement files the hashes that the index states for its files.

`python requirements/hashes.py FILE ...` rewrites the files in place, keeping pins and notes. What
only the GPU build of torch brings, and torch itself, which is installed first, is left out, so that
the same files serve every host. pip-compile's own way downloads the files where the index has no
JSON of PyPI's, and cannot leave anything out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pip._internal.req.constructors import install_req_from_line
from piptools.repositories import PyPIRepository

PIN = re.compile(r"^(?P<pin>(?P<name>[A-Za-z0-9._-]+)==[^\s\\]+)(?P<note>[^\\]*)")
ELSEWHERE = re.compile(r"^(torch|triton|cuda|nvidia)($|-)")


def hashes_of(repository: PyPIRepository, pin: str) -> list[str]:
    """Return the SHA-256 of every file of a release, for all platforms."""
    requirement = install_req_from_line(pin)
    found = {
        candidate.link.hash
        for candidate in repository.find_all_candidates(requirement.name)
        if requirement.specifier.contains(candidate.version, prereleases=True)
        and candidate.link.hash_name == "sha256"
    }
    if not found:
        raise SystemExit(f"the index states no hash of {pin}")
    return sorted(found)


def with_hashes(repository: PyPIRepository, text: str) -> str:
    """Return the text of a requirement file with hashes, in place of those it may have."""
    lines = []
    for line in text.splitlines():
        pinned = PIN.match(line)
        if line.lstrip().startswith("--hash="):
            continue
        if pinned is None:
            lines.append(line)
        elif not ELSEWHERE.match(pinned["name"]):
            hashes = [
                f"    --hash=sha256:{value}" for value in hashes_of(repository, pinned["pin"])
            ]
            lines.append(" \\\n".join([pinned["pin"], *hashes]))
            if note := pinned["note"].strip():
                lines.append(f"    {note}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the files that are named."""
    with TemporaryDirectory() as cache:
        repository = PyPIRepository([], cache_dir=cache)
        with repository.allow_all_wheels():
            texts = {
                path: with_hashes(repository, path.read_text()) for path in map(Path, sys.argv[1:])
            }
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
