"""Compares the claims of README with the committed results and the source."""
import re
import shlex
from dataclasses import fields

import pytest
import readme
from readme import ROOT, filled, published

import train

README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables(text):
    """Every table of a markdown text: (cells of the head, list of rows)."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in block.splitlines()]
        yield head, rows


def test_tables_and_numbers_are_those_of_the_csv():
    """Prevents a table or number in README that was typed by hand, rounded twice, or left behind by a new run: python
    tests/readme.py makes them from results/ and the source."""
    assert filled(README) == README
    assert set(readme.TABLES) == set(readme.BLOCK.findall(README)) and set(readme.NUMBERS) == {name for name, _ in readme.NUMBER.findall(README)}


TRIALS = (ROOT / "results" / "trials.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("told, tried", [
    (r"crowds (\d+) instead of (\d+) %", r"crowded walls (\d+) -> (\d+) %"), (r"\+([\d.]+) points on themselves, \+([\d.]+) on others", r"\(\+([\d.]+)\), on 400 others.*?\(together \+([\d.]+)\)"),
    (r"the right shield (\d+) instead of (\d+) %", r"(?=the right shield .*? (\d+) % with one)the right shield (\d+) % of the time")])
def test_what_was_tried_is_in_the_trials(told, tried):
    """Prevents README from promising an effect that nobody has measured: numbers in its exercises and answers are those
    of results/trials.md."""
    assert re.search(told, README).groups() == re.search(tried, TRIALS).groups()


@pytest.mark.parametrize("command", re.findall(r"python train\.py[^\n`&#|]*", README))
def test_commands_are_understood(command):
    """Prevents a command in the README that the program refuses."""
    train.arguments(shlex.split(command)[2:])


def test_code_that_it_quotes_is_in_the_source():
    """Prevents a walk through code that is no longer there: every line that README quotes is in the source."""
    quoted = re.findall(r"```python\n# (\w+\.py), ([\w.]+)\n(.*?)```", README, re.S)
    assert len(quoted) > 5
    for file, name, code in quoted:
        source = (ROOT / file).read_text(encoding="utf-8")
        body = source[source.index(f"def {name.split('.')[-1]}("):] if "." not in name else source[source.index(f"class {name.split('.')[0]}"):].partition(f"def {name.split('.')[1]}(")[2]
        assert all(f"\n{line}\n" in body for line in code.splitlines()), (file, name)


def test_every_column_is_explained():
    """Prevents a table whose columns nobody explains: README's glossary has all metrics of results.csv and all columns
    of the csv files of the three training stages."""
    (rows,) = [rows for head, rows in tables(README) if head == ["metric", "where", "what it is"]]
    told = " ".join(name for name, *_ in rows).replace("no / single / mixed_search", "no_search single_search mixed_search").replace("answer / search / glance / gaze / malformed_share", "answer_share search_share glance_share gaze_share malformed_share")
    names = set(re.findall(r"[\w /]+", told.replace(",", " ").replace("`", " "))) | set(re.findall(r"\w+", told)) | {"iou"}
    columns = {c for run in ("base-nano-0-pretrain", "heraldry-nano-0-sft", "heraldry-nano-0-rl") for c in published(f"runs/{run}.csv")[0]} - {"step"}
    metrics = {r["metric"].split()[0] if r["metric"][:3] == "iou" else r["metric"] for r in published("results.csv")}
    assert not {c for c in columns | metrics if not set(c.split()) <= names}


def test_line_counts():
    """Prevents the code from silently outgrowing "small enough to read in an evening": the six files have less than
    2,400 lines of code (neither blank, comment nor docstring), and none has more than 400."""
    lines = readme.code_lines()
    assert sum(lines.values()) < 2400 and max(lines.values()) <= 400, lines


def test_what_it_names_is_there():
    """Prevents README from naming a test, a flag, a picture or a file that has been renamed or removed, and from
    containing unfinished text."""
    assert not re.search("TODO|PROSE", README)
    # flags of train.py; of gog.py and data.py; of torchrun
    flags = {"--" + f.name.replace("_", "-") for f in fields(train.Args)} | {f"--no-{f.name}" for f in fields(train.Args) if f.type is bool} | {"--checkpoint", "--html", "--save"} | {"--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout"}
    assert set(re.findall(r"`(--[\w-]+)", README)) <= flags
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
    assert all((ROOT / path).exists() for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README))
