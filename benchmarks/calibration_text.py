"""Builds the calibration text that the package ships, from public sources.

    apt-get download python3.11-doc libpython3.11-stdlib libpython3.11-minimal r-cran-janeaustenr       # Debian 12
    for package in *.deb; do dpkg -x $package sources; done
    python benchmarks/calibration_text.py --wikitext wiki.valid.tokens --debian sources

Sources and shares: two fifths WikiText-2's validation split (the file of its first release, never the test split), the
rest "Pride and Prejudice", pages of CPython's documentation and modules of its standard library. Short pieces of all four
alternate, so that every prefix has the same mixture. data/NOTICE has the licences; the text of Python 3.11.2 (Debian
3.11.2-6+deb12u9) and janeaustenr 1.0.0 gives the file that is committed.

WikiText-2 comes cut into tokens, with rare words replaced by "<unk>". Here tokens are joined again as a writer would have
written them. An unknown word that must be a name becomes one of a few names, the same for the same words before it in an
article; a sentence with any other unknown word, or with half of a quotation, is left out.
"""

from __future__ import annotations

import argparse
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterator

OUTPUT = pathlib.Path(__file__).parent.parent / "src/turboquant_weights/data/calibration.txt.xz"
# Characters of a piece: about a window of calibration.
PIECE = 6000
SHARES = {"wikitext": 0.40, "novel": 0.22, "documentation": 0.20, "source": 0.18}

UNKNOWN = "<unk>"
NAMES = ("Harlow", "Brennan", "Castell", "Whitmore", "Delacroix", "Ashby", "Marlow", "Tanaka", "Okafor", "Lindqvist")
PLACES = ("Eastvale", "Marlbridge", "Santa Clara", "Northwick", "Vellore", "Karlsburg", "Port Ellis", "Hollins Creek")
SENTENCE = re.compile(r'(?<= [.?!]) (?=[A-Z"(<])|(?<= [.?!] ") (?=[A-Z(<])')

PAGES = (
    *(f"tutorial/{page}" for page in ("introduction", "controlflow", "datastructures", "inputoutput", "errors", "classes")),
    *(
        f"howto/{page}"
        for page in ("functional", "sockets", "sorting", "unicode", "annotations", "argparse", "logging", "regex")
    ),
    *(f"library/{page}" for page in ("asyncio-task", "pathlib", "itertools", "sqlite3", "re", "datetime", "string")),
)
MODULES = (
    *("statistics", "fractions", "dataclasses", "shutil", "difflib", "queue", "sched"),
    *("textwrap", "heapq", "functools", "contextlib", "configparser", "tempfile", "calendar"),
)


def join_tokens(text: str) -> str:
    """WikiText's tokens, separated by spaces, as they were in the article."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ('(?:t|s|m|re|ve|ll|d))\b", r"\1", text)
    text = re.sub(r"s ' ", "s' ", text)
    text = re.sub(r" ([,.;:?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r"(?<=\d) (–) (?=\d)", r"\1", text)
    text = re.sub(r" (/|°) ", r"\1", text)
    return re.sub(r'" ([^"]*?) "', r'"\1"', text)


def name_unknown(sentence: str, title: str) -> str | None:
    """The sentence with every unknown word replaced by a name; None where one of them is no name or a quotation is cut."""
    words = sentence.split()
    if words.count('"') % 2 or any(word == "'" and not words[i - 1].endswith("s") for i, word in enumerate(words)):
        return None
    for i, word in enumerate(words):
        if word != UNKNOWN:
            continue
        before = words[i - 1] if i else ""
        after = words[i + 1] if i + 1 < len(words) else ""
        # The first word of a sentence has a capital whether it is a name or not.
        if not ((i > 1 and before[0].isupper()) or after[:1].isupper() or after == "'s"):
            return None
        choices = PLACES if before in ("in", "at", "near", "from", "to") else NAMES
        words[i] = choices[zlib.crc32(f"{title}/{before}".encode()) % len(choices)]
    return " ".join(words)


def wikitext_pieces(path: pathlib.Path) -> Iterator[str]:
    """Articles of the tokenised split, cut where they are long."""
    title, paragraphs = "", []
    for line in path.read_text(encoding="utf-8").split("\n"):
        line = line.strip()
        heading = re.fullmatch(r"(=(?: =)*) (.*?) \1", line)
        if heading and heading[1] == "=":
            yield from pieces(paragraphs)
            title, paragraphs = heading[2], []
        if heading:
            words = name_unknown(heading[2], title)
            if words:
                paragraphs.append(join_tokens(words))
        elif line:
            kept = [name_unknown(sentence, title) for sentence in SENTENCE.split(line)]
            paragraph = join_tokens(" ".join(sentence for sentence in kept if sentence))
            if len(paragraph) > 80:
                paragraphs.append(paragraph)
    yield from pieces(paragraphs)


def novel_pieces(path: pathlib.Path) -> Iterator[str]:
    """Paragraphs of "Pride and Prejudice" from the R package's lazy-load database, line breaks inside them removed."""
    data = path.read_bytes()
    while data:
        unpack = zlib.decompressobj()
        record = unpack.decompress(data[4:])
        data = unpack.unused_data
        # A serialized character vector: of each string a header, its length and its bytes.
        lines = [
            record[found.end() : found.end() + int.from_bytes(found[1], "big")].decode()
            for found in re.finditer(rb"\x00\x04\x00\x09(.{4})", record, re.DOTALL)
        ]
        if lines[0] == "PRIDE AND PREJUDICE":
            paragraphs = re.split(r"\n\n+", "\n".join(lines))
            yield from pieces([re.sub(r"\s+", " ", p) for p in paragraphs if not p.startswith(("PRIDE", "By Jane"))])


def pieces(paragraphs: list[str], size: int = PIECE) -> Iterator[str]:
    """Joins paragraphs to pieces of at least ``size`` characters; a short rest is left out."""
    piece = ""
    for paragraph in paragraphs:
        if len(piece) > size:
            yield piece
            piece = ""
        piece += paragraph.rstrip() + "\n\n"
    if len(piece) > 400:
        yield piece


def rounds(files: list[pathlib.Path]) -> Iterator[str]:
    """Pieces of several files, one of each in turn."""
    queues = [list(pieces(path.read_text(encoding="utf-8").split("\n\n"))) for path in files]
    for turn in range(max(map(len, queues))):
        yield from (queue[turn] for queue in queues if turn < len(queue))


def mixture(sources: dict[str, Iterator[str]]) -> str:
    """Pieces of all sources, the one that is furthest behind its share first, until the first source is used up."""
    written = dict.fromkeys(sources, 0)
    text = []
    while True:
        name = min(written, key=lambda name: written[name] / SHARES[name])
        piece = next(sources[name], None)
        if piece is None:
            return "\n".join(text)
        text.append(piece)
        written[name] += len(piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=pathlib.Path, required=True, help="wiki.valid.tokens of WikiText-2")
    parser.add_argument("--debian", type=pathlib.Path, required=True, help="folder of the unpacked Debian packages")
    parser.add_argument("--out", type=pathlib.Path, default=OUTPUT)
    args = parser.parse_args()
    pages = args.debian / "usr/share/doc/python3.11/html/_sources"
    text = mixture(
        {
            "wikitext": wikitext_pieces(args.wikitext),
            "novel": novel_pieces(args.debian / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
            "documentation": rounds([pages / f"{page}.rst.txt" for page in PAGES]),
            "source": rounds([args.debian / f"usr/lib/python3.11/{module}.py" for module in MODULES]),
        }
    )
    args.out.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{args.out}: {len(text):,} characters, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
