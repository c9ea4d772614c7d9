"""docs/doctor.md and the doctor say the same.

Whoever looks a line up on the page must find the very words that the terminal showed.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/doctor.md").read_text()
SOURCES = sorted((ROOT / "src/gpunvme/doctor").glob("*.py"))


def words(node: ast.expr | None, module: ast.Module) -> list[str]:
    """What an argument may be, each as a text; a value that is only known when it runs is ``…``."""
    if node is None:
        return [""]
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return ["".join(parts)]
    if isinstance(node, ast.IfExp):
        return words(node.body, module) + words(node.orelse, module)
    if isinstance(node, ast.Name):
        values = [
            each.value
            for each in ast.walk(module)
            if isinstance(each, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == node.id for target in each.targets)
        ]
        return [text for value in values for text in words(value, module)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        for function in module.body:
            if isinstance(function, ast.FunctionDef) and function.name == node.func.id:
                answers = [each.value for each in ast.walk(function) if isinstance(each, ast.Return)]
                return [text for answer in answers for text in words(answer, module)]
    if isinstance(node, ast.Tuple):
        return [text for element in node.elts for text in words(element, module)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in words(node.left, module) for right in words(node.right, module)]
    return []


@functools.cache
def troubles() -> list[tuple[str, str, str, str]]:
    """Every finding of the sources that is not green: file, topic, and each text of its cost, fix and commands."""
    found = []
    for source in SOURCES:
        module = ast.parse(source.read_text())
        for call in ast.walk(module):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding"):
                continue
            if ast.unparse(call.args[0]) == "Level.GREEN" or not isinstance(call.args[1], ast.Constant):
                continue
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            for part in ("cost", "fix", "commands"):
                found += [
                    (source.name, str(call.args[1].value), part, text)
                    for text in words(named.get(part), module)
                    if text.strip("…")
                ]
        if source.name == "checks_storage.py":  # its losses are a table of texts
            (losses,) = (each for each in module.body if isinstance(each, ast.FunctionDef) and each.name == "_losses")
            for pair in ast.walk(losses):
                if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                    for part, element in zip(("cost", "fix"), pair.elts, strict=True):
                        found += [(source.name, "file system", part, text) for text in words(element, module)]
    return found


@functools.cache
def rows() -> list[list[str]]:
    """The cells of the page's tables: line, cost, fix."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.replace("\\|", "\0").strip("| ").split(" | ")] for line in lines]


def section(topic: str) -> str:
    return "\n".join(" | ".join(row) for row in rows() if row[0] == topic).replace("\0", "|")


@pytest.mark.parametrize("trouble", sorted(set(troubles())), ids=lambda trouble: f"{trouble[1]}, {trouble[2]}")
def test_page_has_what_the_doctor_says(trouble: tuple[str, str, str, str]) -> None:
    _, topic, _, text = trouble
    assert text in section(topic), f"docs/doctor.md: a row of {topic!r} lacks: {text}"


def test_page_has_no_line_that_the_doctor_has_not() -> None:
    topics = {topic for _, topic, _, _ in troubles()}
    named = {row[0] for row in rows() if row[0] != "line" and not row[0].startswith("--")}
    assert named <= topics | {"probe: drive", "probe: copies", "probe: round trip"}
    assert len(topics) >= 30


def test_page_has_no_cost_that_the_doctor_never_says() -> None:
    said = {(topic, text) for _, topic, part, text in troubles() if part == "cost"}
    costs = {(row[0], row[1].replace("\0", "|")) for row in rows() if len(row) == 3 and row[1] != "costs"}
    assert costs == said
