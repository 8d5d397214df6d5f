"""Writes the second evaluation text: neither Wikipedia nor a source of the calibration text.

    pip download --no-deps --no-binary brotli brotli==1.2.1
    python benchmarks/second_text.py brotli-1.2.1.tar.gz second.txt

Brotli's source package carries three texts to test compression with, all free of copyright, besides its own source (MIT
licence): "Alice's Adventures in Wonderland", the proceedings of a workshop of the Library of Congress (1992), and "As You
Like It". Pieces of about 4,000 characters of the four alternate, so that every few windows hold a story, expository prose,
a play and C.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import re
import tarfile

from calibration_text import pieces

SHA256 = "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de"
PIECE = 4000
ROUNDS = 12
# File in the package, where the text proper begins in it, and whether line breaks inside paragraphs mean nothing.
PARTS = (
    ("tests/testdata/alice29.txt", "Alice was beginning", True),
    ("tests/testdata/lcet10.txt", "Preservation, as that term", True),
    ("tests/testdata/asyoulik.txt", "ORLANDO\tAs I remember", False),
    ("c/enc/encode.c", "BROTLI_BOOL BrotliEncoderSetParameter", False),
)


def second_text(sdist: pathlib.Path) -> str:
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        parts = []
        for name, start, joined in PARTS:
            text = archive.extractfile(f"{root}/{name}").read().decode("ascii").replace("\r\n", "\n")
            paragraphs = re.split(r"\n\s*\n", text[text.index(start) :])
            parts.append(pieces([" ".join(p.split()) for p in paragraphs] if joined else paragraphs, PIECE))
        return "\n".join([next(part) for _ in range(ROUNDS) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=pathlib.Path, help="brotli-1.2.1.tar.gz")
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    digest = hashlib.sha256(args.sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        parser.error(f"{args.sdist} has SHA-256 {digest}; brotli-1.2.1.tar.gz has {SHA256}, other versions give other texts")
    text = second_text(args.sdist)
    args.out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{args.out}: {len(text):,} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
