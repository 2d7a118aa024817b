"""THIRD_PARTY.md lists the licences of all that is installed with the package.

    python tests/test_licences.py

writes it anew, from what the installed packages say of themselves.
"""

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).resolve().parents[1] / "THIRD_PARTY.md"
HEAD = """# Licences of dependencies

hf_rece is under Apache-2.0 (LICENSE) and contains no code of others. What it needs is installed
beside it. CUDA builds of torch bring libraries of NVIDIA, under licences of its own.

| package | licence | needed by |
|---|---|---|
"""
COPYLEFT_HEAD = """
With copyleft, among these and all that they need in turn; they are used as they are:

| package | licence |
|---|---|
"""
SHORT = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
COPYLEFT = re.compile(r"GPL|MPL|EPL|EUPL|CDDL|SSPL|OSL|General Public|Mozilla", re.IGNORECASE)
DEVELOPMENT = ("dev", "benchmarks")


def licence(name):
    """Return what a package says of its licence, in the words of SPDX where they are known."""
    about = metadata(name)
    said = about.get("License-Expression")
    if not said:
        kinds = [kind for kind in about.get_all("Classifier") or [] if kind.startswith("License")]
        said = " AND ".join(kind.rpartition(" :: ")[2] for kind in kinds) or about.get("License")
    said = (said or "unknown").strip().partition("\n")[0]
    return SHORT.get(said, said)


def declared():
    """Return {package: what needs it}, of those that the package declares for its users."""
    project = tomllib.loads((FILE.parent / "pyproject.toml").read_text())["project"]
    groups = {"all": project["dependencies"], **project["optional-dependencies"]}
    found = {}
    for group, lines in groups.items():
        names = [Requirement(line).name.lower() for line in lines]
        if group not in DEVELOPMENT:
            for name in names:
                found.setdefault(name, []).append(group)
    found.pop("hf_rece", None)
    return {name: ", ".join(by) for name, by in sorted(found.items())}


def installed_with(names):
    """Return {package: licence} of packages and all that they need in turn, where installed."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            if name in found:
                continue
            found[name] = licence(name)
        except PackageNotFoundError:
            continue
        for line in requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return dict(sorted(found.items()))


def copyleft():
    found = installed_with(declared())
    return {name: said for name, said in found.items() if COPYLEFT.search(said)}


def text():
    known = installed_with(declared())
    rows = [f"| {name} | {known[name]} | {by} |\n" for name, by in declared().items()]
    return (
        HEAD
        + "".join(rows)
        + COPYLEFT_HEAD
        + "".join(f"| {name} | {said} |\n" for name, said in copyleft().items())
    )


def rows_of_file():
    rows = [line.strip("| ").split(" | ") for line in FILE.read_text().splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def test_every_dependency_is_listed_with_its_licence():
    listed, known = rows_of_file(), installed_with(declared())
    assert set(declared()) <= set(listed), "run python tests/test_licences.py"
    if sys.version_info >= (3, 11):  # for which constraints.txt names one version of each
        told = {name: known[name] for name in declared() if name in known}
        assert {name: listed[name] for name in told} == told, "run python tests/test_licences.py"


def imported():
    """Return the packages, by the names of their modules, that files of ours import."""
    found = set()
    for path in (FILE.parent / "hf_rece").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    return found - {"hf_rece", *sys.stdlib_module_names}


def test_what_is_imported_is_declared():
    packages = packages_distributions()  # of what is installed
    for module in imported() & packages.keys():
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in packages[module]}
        assert names & set(declared()), f"{module} is imported, and not declared"


def test_copyleft_is_flagged():
    flagged = FILE.read_text().partition("copyleft")[2]
    for name, said in copyleft().items():
        assert f"| {name} | {said} |" in flagged


@pytest.mark.parametrize("said", ["GPL-3.0-only", "LGPLv3+", "MPL-2.0 AND MIT", "AGPL-3.0"])
def test_copyleft_is_known_by_its_names(said):
    assert COPYLEFT.search(said)


if __name__ == "__main__":
    FILE.write_text(text())
