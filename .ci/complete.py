"""Compare what was built with what is in the checkout: complete.py DIST LIST_OF_FILES.

The sdist must hold every file but those below, and the wheel every module and every kernel source.
"""

import pathlib
import sys
import tarfile
import zipfile

LEFT_OUT = {".gitignore"}


def main(dist: pathlib.Path, tracked: list[str]) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    package = [name for name in tracked if name.startswith("cupy_delta/")]
    kernels = [name for name in tracked if name.startswith("kernels/")]
    wanted = {*package, *(f"cupy_delta/{name}" for name in kernels)}
    missing = [f"{sdist.name}: {name}" for name in sorted({*tracked} - LEFT_OUT - in_sdist)]
    missing += [f"{wheel.name}: {name}" for name in sorted(wanted - in_wheel)]
    foreign = [n for n in in_wheel if not n.startswith("cupy_delta/") and ".dist-info/" not in n]
    missing += [f"{wheel.name}: unexpected {name}" for name in sorted(foreign)]
    if missing or not kernels:
        sys.exit("\n".join(["missing from what was built:", *missing]))
    print(f"{sdist.name}: all of {len(tracked)} files; {wheel.name}: {len(in_wheel)} files")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text().split())
