"""Sentences of the genres of STS-B, and in none of its pairs but train's: ``python texts.py FOLDER PATH OUT.jsonl``.

``FOLDER`` has public files under the names that they are found under, listed in ``main``; ``PATH`` is STS-B. A line of
``OUT.jsonl`` is ``[genre, sentence]``. Sentences of dev and test are dropped, whatever their case and punctuation;
others of their sources, which may be much like them, are not.
"""

from __future__ import annotations

import csv
import html
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from st_linear.recipe import Pairs

Item = TypeVar("Item")
NAMES = re.compile(r"(?<!^)(?<![.!?] )\b[A-Z][a-z]+(?: [A-Z][a-z]+)*")


def key(sentence: str) -> str:
    """What two sentences share that count as one."""
    return re.sub(r"[^a-z0-9]+", "", sentence.lower())


def cleaned(text: str) -> str:
    """Without markup and line breaks."""
    text = re.sub(r"<[^>]+>", " ", html.unescape(html.unescape(text))).replace("\\", " ")
    return re.sub(r"\s+", " ", text).strip()


def sentences(text: str) -> list[str]:
    """Cut where a sentence seems to end."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", text)


def is_prose(sentence: str) -> bool:
    """Of 4 to 45 words, most of it letters."""
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return 4 <= len(sentence.split()) <= 45 and letters > 0.8 * len(sentence) and "http" not in sentence


class Texts:
    """What was kept, and what it must not hold again."""

    def __init__(self, pairs: Pairs) -> None:
        self.draw = random.Random(0)
        self.seen = {key(sentence) for sentence in pairs.unseen()}
        self.kept: list[tuple[str, str]] = []
        # Gold pairs are short or odd at times, and in STS-B all the same.
        self._keep("train", dict.fromkeys([*pairs.train["sentence1"], *pairs.train["sentence2"]]), None)

    def add(self, genre: str, found: Iterable[str], count: int | None = None) -> list[str]:
        """Keep those of prose, ``count`` at most; all of them are seen."""
        return self._keep(genre, (s for s in map(cleaned, found) if is_prose(s)), count)

    def _keep(self, genre: str, found: Iterable[str], count: int | None) -> list[str]:
        fresh = []
        for sentence in found:
            if key(sentence) not in self.seen:
                self.seen.add(key(sentence))
                fresh.append(sentence)
        self.kept += [(genre, sentence) for sentence in fresh[:count]]
        return fresh

    def shuffled(self, items: Iterable[Item]) -> list[Item]:
        """In random order."""
        copied = list(items)
        self.draw.shuffle(copied)
        return copied

    def changed(self, sentence: str, names: list[str]) -> str:
        """Without a clause, with another number or name, or without some words."""
        kind = self.draw.random()
        if kind < 0.3 and ", " in sentence:
            clauses = sentence.split(", ")
            del clauses[self.draw.randrange(len(clauses))]
            return ", ".join(clauses)
        if kind < 0.55 and re.search(r"\d", sentence):
            return re.sub(r"\d+", lambda m: str(self.draw.randrange(1, max(2, 10 ** len(m[0])))), sentence, count=2)
        if kind < 0.8 and NAMES.search(sentence):
            return sentence.replace(self.draw.choice(NAMES.findall(sentence)), self.draw.choice(names))
        words = sentence.split()
        dropped = max(2, int(len(words) * self.draw.uniform(0.15, 0.35)))
        start = self.draw.randrange(0, max(1, len(words) - dropped))
        return " ".join(words[:start] + words[start + dropped :])


def main(folder: str, data: str, output: str) -> None:
    """Read all files, in this order, and write."""
    files, texts = Path(folder), Texts(Pairs.load(data))
    csv.field_size_limit(10**9)

    def lines(name: str, **options: str) -> list[str]:
        return (files / name).read_text(**{"encoding": "utf-8", "errors": "ignore"} | options).splitlines()

    # Microsoft Research Paraphrase Corpus.
    pairs = [
        line.split("\t")[3:5] for s in ("train", "test") for line in lines(f"mrpc_{s}.txt", encoding="utf-8-sig")[1:]
    ]
    news = texts.add("mrpc", (sentence for pair in pairs for sentence in pair))
    # AG's news, test: class, title, description.
    rows = [row for row in csv.reader(lines("ag.csv")) if len(row) == 3]
    agency = re.compile(r"^[A-Z][\w ,./]{0,40}?(\([A-Za-z .]+\))?\s+-+\s+")
    found = [agency.sub("", sentence) for row in texts.shuffled(rows) for sentence in sentences(cleaned(row[2]))[:2]]
    news += texts.add("ag-text", found, 9000)
    texts.add("ag-title", (re.sub(r"\([\w. ]+\)$", "", row[1]) for row in texts.shuffled(rows)), 3500)
    # UCI News Aggregator: headlines, stories one behind the other.
    texts.add("uci", (row[1] for row in csv.reader(lines("uci.csv")) if len(row) > 5), 11000)
    # Headlines that are no clickbait, of Chakraborty et al. 2016.
    texts.add("headline", texts.shuffled(lines("headlines.txt")), 5000)
    # Flickr8k, COCO val2017: the captions of a picture one behind the other; SICK.
    captions: dict[str, list[str]] = {}
    for line in lines("flickr.txt"):
        name, _, caption = line.partition("\t")
        captions.setdefault(name.split("#")[0], []).append(caption)
    texts.add("flickr", (c for name in texts.shuffled(sorted(captions)) for c in captions[name]), 8000)
    pictures: dict[int, list[str]] = {}
    for note in json.loads((files / "coco.json").read_text(encoding="utf-8"))["annotations"]:
        pictures.setdefault(note["image_id"], []).append(note["caption"])
    texts.add("coco", (c for picture in texts.shuffled(sorted(pictures)) for c in pictures[picture]), 5000)
    texts.add("sick", (s for line in lines("sick.txt")[1:] for s in line.split("\t")[1:3]))
    # Stack Exchange: questions on travel, cooking and robotics; posts on beer, coffee, and the site of data science.
    asked: list[str] = []
    for name in ("travel", "cooking", "robotics"):
        with (files / f"{name}.csv").open(encoding="utf-8", errors="ignore") as file:
            asked += [s for row in csv.reader(file) if len(row) >= 2 for s in (row[0], *sentences(cleaned(row[1])))]
    posts: list[str] = []
    for name in ("beer", "coffee", "smdm"):
        for body in re.findall(
            r'Body="([^"]*)"', (files / f"{name}.xml").read_text(encoding="utf-8", errors="ignore")
        ):
            paragraphs = re.findall(r"<p>(.*?)</p>", html.unescape(body), re.DOTALL)
            posts += [sentence for paragraph in paragraphs for sentence in sentences(cleaned(paragraph))]
    texts.add("forum", texts.shuffled(asked), 6000)
    texts.add("forum", texts.shuffled(posts), 9000)
    names = [name for sentence in news for name in NAMES.findall(sentence)]
    texts.add("variant", (texts.changed(sentence, names) for sentence in texts.draw.sample(news, 9000)))
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in texts.kept), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
