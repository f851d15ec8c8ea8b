"""The environment of these tests, beside the one that the library itself is tested in."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """Versions of a file of requirements, by normalised name."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_both_environments_have_the_same_versions():
    own, others = pins("interop"), pins("run") | pins("dev")
    del own["chardet"]  # a dependency of lm-eval wants one below 7; nothing here imports it
    differ = {
        name: (own[name], others[name]) for name in own.keys() & others if own[name] != others[name]
    }
    assert not differ


def test_this_environment_is_the_pinned_one():
    from importlib.metadata import version

    installed = {name: version(name).partition("+")[0] for name in pins("interop")}
    assert installed == pins("interop")
